"""Data: sources of images, transforms, mixing, and loaders whose batches follow from one seed."""

from arm_core.data.augment import RandAugment
from arm_core.data.digits import Digits
from arm_core.data.loader import EvalBatch, EvalLoader, TrainLoader
from arm_core.data.mixing import OFFICIAL_MIXING, Mixing
from arm_core.data.sources import IMAGE_SUFFIXES, UNLABELLED, ImageFolder, ImageSource, Item, Synthetic
from arm_core.data.transforms import (
    FINETUNE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRETRAIN,
    EvalTransform,
    TrainTransform,
    denormalize,
    load_image,
)

__all__ = [
    "FINETUNE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "OFFICIAL_MIXING",
    "PRETRAIN",
    "UNLABELLED",
    "Digits",
    "EvalBatch",
    "EvalLoader",
    "EvalTransform",
    "ImageFolder",
    "ImageSource",
    "Item",
    "Mixing",
    "RandAugment",
    "Synthetic",
    "TrainLoader",
    "TrainTransform",
    "denormalize",
    "load_image",
]
