"""The models as a library offers them: `torch.nn.Module`s on images (B, 3, H, W), in timm's terms.

They are the engine's modules (`arm_cuda.model`), with the same parameter names; only inputs and outputs
differ. `arm_vision.load_model` creates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from arm_core.data.model_config import ModelConfig
from arm_core.engine.modules import POOLINGS, block_indices
from arm_core.engine.protocol import Array
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec
from arm_core.model.tokens import direction_orders, patch_order
from arm_cuda.features import positions_for
from arm_cuda.library_base import LibraryModel
from arm_cuda.model import Classifier, PretrainModel, unfold_patches

FLOAT32_ONLY = (".A_log", ".mixer.D", ".dt_proj.bias")
"""Suffixes of the names of parameters that stay float32 for every `dtype`."""


class ArmClassifier(LibraryModel, Classifier):
    """An ARM classifier: `model(images)` gives the logits (B, classes) of normalized images (B, 3, H, W)."""

    spec: ClassifierSpec

    def __init__(
        self,
        spec: ClassifierSpec,
        config: ModelConfig | None = None,
        *,
        scan: str = "auto",
        dynamic_image_size: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(spec, scan)
        self._set_up(config or ModelConfig(), scan, dynamic_image_size, drop_path_rate)
        self.num_classes, self.num_prefix_tokens = spec.classes, 1

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling: `avg` or `token`."""
        return "avg" if self.spec.pooling is Pooling.MEAN else "token"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the engine's forward returns a dict
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) from the tokens of `forward_features`; with `pre_logits` the pooled (B, D)."""
        pooled = self.pool(x)
        return pooled if pre_logits else self.head(pooled)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that the outputs of the given blocks do not need (timm's `features_only`)."""
        wanted = block_indices(len(self.layers), indices)
        self.layers = self.layers[: max(wanted) + 1]
        if prune_norm:
            self.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes; 0 for none: `model(x)` is then the pooled vector (B, D).

        global_pool: `avg` or `token`, or this package's names `mean` or `cls`.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, found {num_classes}")
        if global_pool:
            if global_pool not in POOLINGS:
                raise ValueError(f"global_pool: expected {', '.join(POOLINGS)}, found {global_pool!r}")
            self.set_pooling(POOLINGS[global_pool])
        self.num_classes, self._config = num_classes, self._config.without_classes()
        if num_classes == 0:
            self.head = nn.Identity()  # type: ignore[assignment]
            return
        self.spec = replace(self.spec, classes=num_classes)
        like = self.patch_embed.weight
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def set_pooling(self, pooling: Pooling) -> None:
        """Change the pooling of the tokens."""
        self.spec = replace(self.spec, pooling=pooling)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, ModelSpec]:
        images, spec = self._checked(images)
        assert isinstance(spec, ClassifierSpec)
        if spec is self.spec:
            return self.embed(images, self.pos_embed), self.order, spec
        order = torch.from_numpy(direction_orders(spec)).to(images.device)
        return self.embed(images, positions_for(self.pos_embed, self.spec, spec)), order, spec

    def _record(self, images: Tensor, seen: dict[str, Tensor]) -> None:
        Classifier.forward(self, images, None, seen)

    def _last_norm(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm_f(x))


class ArmPretrainer(LibraryModel, PretrainModel):
    """A pretraining model: `model(images)` gives its outputs by name (`loss`, `prediction`, ...).

    For features its encoder reads all clusters in prediction order, the last one included, and the norm is
    that of the decoder's last tap. There is no class token and no head.
    """

    spec: PretrainSpec
    num_classes = 0

    def __init__(
        self, spec: PretrainSpec, config: ModelConfig | None = None, *, scan: str = "auto",
        dynamic_image_size: bool = False, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        if dynamic_image_size:
            raise ValueError("dynamic_image_size: not available in pretraining; pass image_size=(H, W)")
        super().__init__(spec, scan)
        self._set_up(config or ModelConfig(), scan, dynamic_image_size, drop_path_rate)
        order = patch_order(spec)
        self.register_buffer("_patch_order", torch.from_numpy(order), persistent=False)
        self.register_buffer("_raster", torch.from_numpy(np.argsort(order)), persistent=False)
        identity = torch.arange(spec.patches, dtype=torch.int32)[None]
        self.register_buffer("_all_patches", identity, persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        images, _ = self._checked(x)
        return PretrainModel.forward(self, images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of the tokens of `forward_features`, (B, D)."""
        return x.mean(1)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, ModelSpec]:
        images, spec = self._checked(images)
        read = self.get_buffer("_patch_order")
        patches = unfold_patches(images, spec.encoder.patch)[:, read]
        return self.patch_embed(patches) + self.pos_embed[read], self.get_buffer("_all_patches"), spec

    def _record(self, images: Tensor, seen: dict[str, Tensor]) -> None:
        PretrainModel.forward(self, images, None, seen)

    def _last_norm(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tap_norms[-1](x))

    def _in_raster_order(self, x: Tensor, spec: ModelSpec) -> Tensor:
        return x[:, self.get_buffer("_raster")]


def create_module(
    spec: ModelSpec,
    parameters: Mapping[str, Array],
    config: ModelConfig,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> ArmClassifier | ArmPretrainer:
    """The library's module with these values, in evaluation mode. options: arguments of its class."""
    kind: Any = ArmPretrainer if isinstance(spec, PretrainSpec) else ArmClassifier
    model: ArmClassifier | ArmPretrainer = kind(spec, config, **options)
    tensors = {name: torch.tensor(np.asarray(parameters[name], np.float32)) for name in parameter_table(spec)}
    model.load_state_dict(tensors, assign=True)
    for name, row in parameter_table(spec).items():
        model.get_parameter(name).requires_grad_(row.trainable)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected a type such as torch.bfloat16, found {dtype!r}")
    try:
        model = model.eval().to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch without CUDA
        raise ValueError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
    for name, parameter in model.named_parameters():
        if name.endswith(FLOAT32_ONLY):  # products of many decays lose bits in half precision
            parameter.data = parameter.data.float()
    return model
