"""The models as a library offers them: `mlx.nn.Module`s on images (B, H, W, 3), in timm's terms.

They are the engine's own modules (`arm_mlx.model`) with parameters of the same names; only the way in and
out differs. `arm_vision.load_model` makes them. Twin: `arm_cuda.library`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from arm_core.data.model_config import ImagePipeline, ModelConfig
from arm_core.engine.images import UNNORMALIZED, spec_for_images
from arm_core.engine.modules import POOLINGS, block_indices, decay_free, pooled
from arm_core.engine.protocol import Array
from arm_core.engine.scans import choose_scan
from arm_core.files.model_folder import write_model
from arm_core.model.drop_path import drop_rates
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec
from arm_core.model.tokens import direction_orders, patch_order
from arm_mlx.features import positions_for, without_class_token
from arm_mlx.layers import Linear, Product, named
from arm_mlx.model import Classifier, PretrainModel, Trunk, unfold_patches
from arm_mlx.scan import scans


class LibraryModel(Trunk):
    """What both library models share: checks of images, features of blocks, saving.

    `spec` is the model's spec, `config` its image preprocessing and class names in timm's words.
    """

    spec: ModelSpec
    num_classes: int

    def _set_up(self, config: ModelConfig, dynamic_image_size: bool, drop_path_rate: float) -> None:
        drop_rates(drop_path_rate, 1)  # refuses a rate out of range
        self._config = config
        self.dynamic_image_size, self.drop_path_rate = dynamic_image_size, drop_path_rate
        self.grad_checkpointing = self._images_checked = False
        self.num_features = self.embed_dim = self.head_hidden_size = self.spec.encoder.width
        for layer in self.layers:
            layer.mixer.save_for_backward = True  # gradients also in evaluation mode

    @property
    def config(self) -> dict[str, Any]:
        """Input size (C, H, W), mean, std, crop and class names, by timm's keys."""
        return self._config.describe(self.spec)

    def transform(self, training: bool = False, *, seed: int = 0) -> ImagePipeline[mx.array]:
        """A function from an image (path, bytes, Pillow image, uint8 array) to a float32 array (H, W, 3).

        training: random crops and flips, drawn from `seed` and the number of the call.
        """
        return ImagePipeline(self._config, self.spec.image_size, mx.array, training=training, seed=seed)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a model folder that every engine reads; ValueError where it exists (unless `force`)."""
        if self.num_classes != getattr(self.spec, "classes", 0):
            raise ValueError("save: expected a complete model, found one without head")
        arrays = {n: np.array(a.astype(mx.float32)) for n, a in named(self.parameters()).items()}
        return write_model(folder, self.spec, arrays, metadata=self._config.stored(), force=force)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW must not decay, as in the official recipes."""
        return decay_free(self.spec)

    def extract(self, images: Array, *, block: int | None = None, pool: str = "default") -> Array:
        """Features of normalized images (B, H, W, 3) as NumPy; see `arm_core.engine.modules.pooled`."""
        x = mx.array(images)
        if block is None and pool == "default":
            found = self.forward_head(self.forward_features(x), pre_logits=True)
            return np.array(found.astype(mx.float32))
        maps = self.forward_intermediates(
            x, [-1 if block is None else block], True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        patches, prefix = maps[0] if isinstance(maps[0], tuple) else (maps[0], None)
        arrays = [None if a is None else np.array(a.astype(mx.float32)) for a in (patches, prefix)]
        return pooled(cast(Array, arrays[0]), arrays[1], pool, self.spec)

    def forward_features(self, x: mx.array) -> mx.array:
        """Normalized tokens of the last block, (B, T, D) in raster order.

        A classifier has its class token in their middle.
        """
        tokens, order, _ = self._tokens(x)
        return self._in_raster_order(self._last_norm(self._run_blocks(tokens, order)[-1]))

    def forward_intermediates(
        self,
        x: mx.array,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of blocks as feature maps, as in timm.

        indices: blocks; None for all, n for the last n.  norm: apply the last norm to each.
        return_prefix_tokens: pair each map with its class token (B, 1, D).
        stop_early: compute no block after the last one asked for.
        output_fmt: `NCHW` (B, D, rows, columns) or `NLC` (B, patches, D).
        Returns the list of maps, or (tokens as of `forward_features`, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected NCHW or NLC, found {output_fmt!r}")
        wanted = block_indices(len(self.layers), indices)
        tokens, order, spec = self._tokens(x)
        outputs = self._run_blocks(tokens, order, max(wanted) if stop_early or intermediates_only else None)
        maps: list[Any] = []
        for i in wanted:
            y = self._in_raster_order(self._last_norm(outputs[i]) if norm else outputs[i])
            patches, prefix = without_class_token(y, spec)
            if output_fmt == "NCHW":
                patches = patches.swapaxes(1, 2).reshape(len(x), -1, *spec.grid)
            maps.append((patches, prefix) if return_prefix_tokens and prefix is not None else patches)
        if intermediates_only:
            return maps
        return self._in_raster_order(self._last_norm(outputs[-1])), maps

    def forward_head(self, x: mx.array, pre_logits: bool = False) -> mx.array:
        raise NotImplementedError

    def _tokens(self, images: mx.array) -> tuple[mx.array, mx.array, ModelSpec]:
        """What the first block reads (B, T, D), the order table, and the spec for the size of the images."""
        raise NotImplementedError

    def _last_norm(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def _in_raster_order(self, x: mx.array) -> mx.array:
        return x

    def _checked(self, images: mx.array) -> ModelSpec:
        """The spec for the size of the images; ValueError where they do not fit."""
        spec = spec_for_images(
            self.spec, tuple(images.shape), channels_last=True, dynamic=self.dynamic_image_size
        )
        if not self._images_checked:
            self._images_checked = True
            self._warn_of_unnormalized(images)
        return spec

    def _warn_of_unnormalized(self, images: mx.array) -> None:
        try:
            largest = float(cast(float, mx.abs(images).max().item())) if images.size else 0.0
        except (RuntimeError, ValueError):
            return  # inside a compilation the values cannot be read
        if not mx.issubdtype(images.dtype, mx.floating) or largest > UNNORMALIZED:
            warnings.warn(
                f"images: found {images.dtype} values up to {largest:g}; the model expects float images "
                "normalized by the mean and std in model.config; use model.transform()",
                stacklevel=5,
            )

    def _run_blocks(self, x: mx.array, order: mx.array, last: int | None = None) -> list[mx.array]:
        """Outputs of the blocks, up to index `last`, on tokens (B, T, D)."""
        scales = self._drop_path_scales(len(x))
        outputs = []
        for i, layer in enumerate(self.layers[: None if last is None else last + 1]):
            scale = None if scales is None else scales[i]
            run = partial(layer, order=order, scale=scale, name="", seen=None)
            x = nn.utils.checkpoint(layer, run)(x) if self.grad_checkpointing else run(x)
            outputs.append(x)
        return outputs

    def _drop_path_scales(self, batch: int) -> mx.array | None:
        """(depth, 2, B) factors of the residual branches, from MLX's generator; None outside training."""
        if not self.training or self.drop_path_rate == 0:
            return None
        rates = drop_rates(self.drop_path_rate, self.spec.encoder.depth)
        kept_share = mx.array((1.0 - rates).astype(np.float32))[:, None, None]
        draws = mx.random.uniform(shape=(len(rates), 2, batch))
        return (draws < kept_share) / kept_share


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
    bfloat16; parameters stay float32.  options: those of the module's class.
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
