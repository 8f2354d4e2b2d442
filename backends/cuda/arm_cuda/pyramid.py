"""Feature maps at several strides from a plain backbone, for detectors and segmentation heads.

The simple feature pyramid of ViTDet (arXiv:2203.16527, section 3) computes every map from the backbone's
last map only, by transposed convolutions or pooling.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from arm_cuda.library_base import LibraryModel


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """An ARM model with feature maps at several strides.

    model: from `load_model`; load it with `dynamic_image_size=True` for images of any size.
    strides: pixels per map point, ascending, each the patch size times or divided by a power of two.
    channels: of every map.  index: the block whose output is read; None for the last one.

    `pyramid(images)` maps (B, 3, H, W) to an ordered dict `{"0": (B, channels, H / strides[0], ...), ...}`,
    finest first. Torchvision's detection models take it as `backbone`, with `out_channels`. `maps(images)`
    returns a tuple, the interface of mmdetection's and mmsegmentation's backbones.
    Raises ValueError for a stride that does not fit the patch size.
    """

    def __init__(
        self,
        model: LibraryModel,
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        channels: int = 256,
        index: int | None = None,
    ) -> None:
        super().__init__()
        patch, width = model.spec.encoder.patch, model.num_features
        powers = []
        for stride in strides:
            power = math.log2(stride / patch) if stride > 0 else math.nan
            if not power.is_integer():
                raise ValueError(
                    f"strides: expected {patch} (the patch size) times a power of two, found {stride}"
                )
            powers.append(int(power))
        if not powers or sorted(set(powers)) != powers:
            raise ValueError(f"strides: expected ascending strides, found {tuple(strides)}")
        self.model, self.strides, self.out_channels = model, tuple(strides), channels
        self.index = len(model.layers) - 1 if index is None else index
        self.norm = ChannelNorm(width)
        self.scales = nn.ModuleList(_scale(width, channels, power) for power in powers)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), y) for i, y in enumerate(self.maps(images)))

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The feature maps, finest first."""
        (x,) = self.model.forward_intermediates(images, [self.index], intermediates_only=True)
        x = self.norm(x)
        return tuple(scale(x) for scale in self.scales)


def _scale(width: int, channels: int, power: int) -> nn.Sequential:
    """From the backbone's map to one of 2^power times its stride: resample, then 1x1 and 3x3 convolutions."""
    layers: list[nn.Module] = []
    for i in range(-power):
        narrower = max(channels, width // 2)
        layers.append(nn.ConvTranspose2d(width, narrower, 2, 2))
        width = narrower
        if i < -power - 1:
            layers += [ChannelNorm(width), nn.GELU()]
    layers += [nn.MaxPool2d(2, 2) for _ in range(power)]
    layers += [
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    ]
    return nn.Sequential(*layers)


class LinearSegmenter(nn.Module):
    """Classes for every pixel from one 1x1 convolution on a backbone's last map: the usual linear protocol.

    model: from `load_model`.  classes: of the pixels.  `segmenter(images)` gives logits
    (B, classes, H, W), resized bilinearly from the patch grid.
    """

    def __init__(self, model: LibraryModel, classes: int) -> None:
        super().__init__()
        self.model = model
        self.norm = nn.BatchNorm2d(model.num_features)
        self.head = nn.Conv2d(model.num_features, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        (x,) = self.model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
        logits = self.head(self.norm(x))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
