"""Data: sources of images, transforms, mixing, and loaders whose batches follow from one seed."""

from arm_core.data.augment import RandAugment
from arm_core.data.decode import BadImage
from arm_core.data.digits import Digits
from arm_core.data.folder import ImageFolder
from arm_core.data.loader import EvalBatch, EvalLoader, TrainLoader
from arm_core.data.mixing import OFFICIAL_MIXING, Mixing
from arm_core.data.sources import UNLABELLED, ImageSource, Item, ListedSource, Synthetic
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
from arm_core.data.walk import IMAGE_SUFFIXES

__all__ = [
    "FINETUNE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "OFFICIAL_MIXING",
    "PRETRAIN",
    "UNLABELLED",
    "BadImage",
    "Digits",
    "EvalBatch",
    "EvalLoader",
    "EvalTransform",
    "ImageFolder",
    "ImageSource",
    "Item",
    "ListedSource",
    "Mixing",
    "RandAugment",
    "Synthetic",
    "TrainLoader",
    "TrainTransform",
    "denormalize",
    "load_image",
]
