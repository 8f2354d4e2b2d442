"""The models as a library offers them: `mlx.nn.Module`s on images (B, H, W, 3), in timm's terms.

They are the engine's modules (`arm_mlx.model`), with the same parameter names; only inputs and outputs
differ. `arm_vision.load_model` creates them. Twin: `arm_cuda.library`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from arm_core.data.model_config import ModelConfig
from arm_core.engine.modules import POOLINGS
from arm_core.engine.protocol import Array
from arm_core.engine.scans import choose_scan
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec
from arm_core.model.tokens import direction_orders, patch_order
from arm_mlx.features import positions_for
from arm_mlx.layers import Linear, Product
from arm_mlx.library_base import LibraryModel
from arm_mlx.model import Classifier, PretrainModel, unfold_patches
from arm_mlx.scan import scans


class ArmClassifier(LibraryModel, Classifier):
    """An ARM classifier: `model(images)` gives the logits (B, classes) of normalized images (B, H, W, 3)."""

    spec: ClassifierSpec

    def __init__(
        self,
        spec: ClassifierSpec,
        config: ModelConfig | None = None,
        *,
        scan: str,
        dynamic_image_size: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(spec, scan)
        self._set_up(config or ModelConfig(), dynamic_image_size, drop_path_rate)
        self.num_classes = spec.classes

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling: `avg` or `token`."""
        return "avg" if self.spec.pooling is Pooling.MEAN else "token"

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]  # the engine's returns a dict
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: mx.array, pre_logits: bool = False) -> mx.array:
        """Logits (B, classes) from the tokens of `forward_features`; with `pre_logits` the pooled (B, D)."""
        pooled_ = self.pool(x)
        return pooled_ if pre_logits or self.num_classes == 0 else self.head(pooled_)

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
            self.spec = replace(self.spec, pooling=POOLINGS[global_pool])
        self.num_classes, self._config = num_classes, self._config.without_classes()
        if num_classes == 0:
            self.head = nn.Identity()  # type: ignore[assignment]
            return
        self.spec = replace(self.spec, classes=num_classes)
        head = Linear(self.num_features, num_classes)
        head.weight = 0.02 * mx.random.normal(head.weight.shape)
        head.dtype = self.patch_embed.dtype
        self.head = head

    def _tokens(self, images: mx.array) -> tuple[mx.array, mx.array, ModelSpec]:
        spec = self._checked(images)
        assert isinstance(spec, ClassifierSpec)
        if spec is self.spec:
            return self.embed(images, self.pos_embed), self._order, spec
        positions = positions_for(self.pos_embed, self.spec, spec)
        return self.embed(images, positions), mx.array(direction_orders(spec)), spec

    def _record(self, images: mx.array, seen: dict[str, mx.array]) -> None:
        Classifier.__call__(self, images, None, seen)

    def _last_norm(self, x: mx.array) -> mx.array:
        return self.norm_f(x)


class ArmPretrainer(LibraryModel, PretrainModel):
    """A pretraining model: `model(images)` gives its outputs by name (`loss`, `prediction`, ...).

    For features its encoder reads all clusters in prediction order, the last one included, and the norm is
    that of the decoder's last tap. There is no class token and no head.
    """

    spec: PretrainSpec
    num_classes = 0

    def __init__(
        self,
        spec: PretrainSpec,
        config: ModelConfig | None = None,
        *,
        scan: str,
        dynamic_image_size: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        if dynamic_image_size:
            raise ValueError("dynamic_image_size: not available in pretraining; pass image_size=(H, W)")
        super().__init__(spec, scan)
        self._set_up(config or ModelConfig(), dynamic_image_size, drop_path_rate)
        order = patch_order(spec)
        self._read, self._raster = mx.array(order), mx.array(np.argsort(order))
        self._identity = mx.arange(spec.patches, dtype=mx.int32)[None]

    def __call__(self, x: mx.array) -> dict[str, mx.array]:  # type: ignore[override]
        self._checked(x)
        return PretrainModel.__call__(self, x)

    def forward_head(self, x: mx.array, pre_logits: bool = False) -> mx.array:
        """The mean of the tokens of `forward_features`, (B, D)."""
        return x.mean(1)

    def _tokens(self, images: mx.array) -> tuple[mx.array, mx.array, ModelSpec]:
        spec = self._checked(images)
        patches = unfold_patches(images, spec.encoder.patch)[:, self._read]
        return self.patch_embed(patches) + self.pos_embed[self._read], self._identity, spec

    def _record(self, images: mx.array, seen: dict[str, mx.array]) -> None:
        PretrainModel.__call__(self, images, None, seen)

    def _last_norm(self, x: mx.array) -> mx.array:
        return self.tap_norms[-1](x)

    def _in_raster_order(self, x: mx.array) -> mx.array:
        return x[:, self._raster]


def create_module(
    spec: ModelSpec,
    parameters: Mapping[str, Array],
    config: ModelConfig,
    *,
    device: Any = None,
    dtype: mx.Dtype | None = None,
    scan: str = "auto",
    **options: Any,
) -> ArmClassifier | ArmPretrainer:
    """The library's module with these values, in evaluation mode.

    device: None, or MLX's default device, on which modules run.  dtype: of the matrix products, float32 or
    bfloat16; parameters stay float32.  options: arguments of the module's class.
    """
    here = "gpu" if mx.default_device().type == mx.gpu and mx.metal.is_available() else "cpu"
    if device is not None and str(device) not in (here, str(mx.default_device())):
        raise ValueError(
            f"device: MLX runs on its default device, {here}, found {device!r}; "
            f"call mx.set_default_device(mx.{'gpu' if here == 'cpu' else 'cpu'}) first"
        )
    if dtype not in (None, mx.float32, mx.bfloat16):
        raise ValueError(f"dtype: expected mx.float32 or mx.bfloat16, found {dtype}")
    kind: Any = ArmPretrainer if isinstance(spec, PretrainSpec) else ArmClassifier
    model: ArmClassifier | ArmPretrainer = kind(spec, config, scan=choose_scan(scans(here), scan), **options)
    table = parameter_table(spec)
    model.load_weights([(name, mx.array(np.asarray(parameters[name], np.float32))) for name in table])
    fixed = [name for name, row in table.items() if not row.trainable]
    model.freeze(recurse=False, keys=fixed, strict=True)
    for module in model.modules():
        if isinstance(module, Product):
            module.dtype = dtype or mx.float32
    model.eval()
    return model
