"""The base class of the library models. See `library`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from arm_core.data.model_config import ImagePipeline, ModelConfig
from arm_core.engine.images import UNNORMALIZED, spec_for_images
from arm_core.engine.modules import block_indices, decay_free, pooled
from arm_core.engine.protocol import Array, TrainingState
from arm_core.files.model_folder import write_model
from arm_core.model.drop_path import drop_rates
from arm_core.model.spec import ModelSpec
from arm_mlx.features import without_class_token
from arm_mlx.layers import named
from arm_mlx.model import Trunk

if TYPE_CHECKING:
    from arm_core.explain.influence import Influence


class LibraryModel(Trunk):
    """Base class of both library models: checks of images, features of blocks, saving.

    `spec` is the model's spec, `config` its image preprocessing and class names in timm's words.
    """

    spec: ModelSpec
    num_classes: int

    def _set_up(self, config: ModelConfig, dynamic_image_size: bool, drop_path_rate: float) -> None:
        drop_rates(drop_path_rate, 1)  # raises if a rate is out of range
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
        """Write a model folder that every engine reads; ValueError if it exists (unless `force`)."""
        if self.num_classes != getattr(self.spec, "classes", 0):
            raise ValueError("save: expected a complete model, found one without head")
        arrays = {n: np.array(a.astype(mx.float32)) for n, a in named(self.parameters()).items()}
        return write_model(folder, self.spec, arrays, metadata=self._config.stored(), force=force)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and recompute the rest."""
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

    def influence(self, images: mx.array, layers: Iterable[int] | None = None) -> Influence:
        """How much each token contributes to each other token in every mixer (`arm_core.explain.influence`).

        images: (B, H, W, 3), normalized, of the model's image size.  layers: blocks from 0; None for all.
        The maps are computed on the CPU. Raises ValueError for other sizes and for a layer that does not
        exist.
        """
        from arm_core.explain.influence import influence

        spec = self._checked(images)
        if spec is not self.spec:
            raise ValueError(f"influence: expected images of {self.spec.image_size}, found {spec.image_size}")
        return influence(_Recorder(self), np.array(images.astype(mx.float32)), layers=layers)

    def _record(self, images: mx.array, seen: dict[str, mx.array]) -> None:
        """Run the model on images (B, H, W, C) and note its intermediate tensors."""
        raise NotImplementedError

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
        stop_early: compute no block after the last requested one.
        output_fmt: `NCHW` (B, D, rows, columns) or `NLC` (B, patches, D).
        Returns the list of maps, or (the result of `forward_features`, list).
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
        """The input of the first block (B, T, D), the order table, and the spec for the images' size."""
        raise NotImplementedError

    def _last_norm(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def _in_raster_order(self, x: mx.array) -> mx.array:
        return x

    def _checked(self, images: mx.array) -> ModelSpec:
        """The spec for the size of the images; ValueError if they do not fit."""
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
            return  # values cannot be read inside a compiled function
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


class _Recorder:
    """A library model where influence maps expect an engine."""

    def __init__(self, model: LibraryModel) -> None:
        self.spec, self._model = model.spec, model

    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        seen: dict[str, mx.array] = {}
        self._model._record(mx.array(images), seen)
        return {name: np.array(value.astype(mx.float32)) for name, value in seen.items()}

    def export_state(self) -> TrainingState:
        arrays = named(self._model.parameters())
        return TrainingState(parameters={n: np.array(a.astype(mx.float32)) for n, a in arrays.items()})
