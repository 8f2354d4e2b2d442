"""The base class of the library models. See `library`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arm_core.data.model_config import ImagePipeline, ModelConfig
from arm_core.engine.images import UNNORMALIZED, spec_for_images
from arm_core.engine.modules import block_indices, decay_free, pooled
from arm_core.engine.protocol import Array, TrainingState
from arm_core.engine.scans import choose_scan
from arm_core.files.model_folder import write_model
from arm_core.model.drop_path import drop_rates
from arm_core.model.spec import ModelSpec
from arm_cuda.features import without_class_token
from arm_cuda.gate import transformed
from arm_cuda.layers import Block
from arm_cuda.model import Trunk
from arm_cuda.scan import scans

if TYPE_CHECKING:
    from arm_core.explain.influence import Influence


class LibraryModel(Trunk):
    """Base class of both library models: checks of images, features of blocks, saving.

    `spec` is the model's spec, `config` its image preprocessing and class names in timm's words.
    """

    spec: ModelSpec
    num_classes: int

    def _set_up(
        self, config: ModelConfig, scan: str, dynamic_image_size: bool, drop_path_rate: float
    ) -> None:
        drop_rates(drop_path_rate, 1)  # raises if a rate is out of range
        self._config, self._scan = config, scan
        self._choose_scan()
        self.dynamic_image_size, self.drop_path_rate = dynamic_image_size, drop_path_rate
        self.grad_checkpointing = self._images_checked = False
        self.num_features = self.embed_dim = self.head_hidden_size = self.spec.encoder.width
        self.num_prefix_tokens = 0
        self.feature_info = [
            {"num_chs": self.num_features, "reduction": self.spec.encoder.patch, "module": f"layers.{i}"}
            for i in range(len(self.layers))
        ]

    @property
    def config(self) -> dict[str, Any]:
        """Input size (C, H, W), mean, std, crop and class names, by timm's keys."""
        return self._config.describe(self.spec)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """`config`, under the name that `timm.data.resolve_data_config` reads."""
        return self.__dict__.get("_timm_cfg") or self.config

    @pretrained_cfg.setter
    def pretrained_cfg(self, value: dict[str, Any]) -> None:
        self.__dict__["_timm_cfg"] = value

    default_cfg = pretrained_cfg

    def transform(self, training: bool = False, *, seed: int = 0) -> ImagePipeline[Tensor]:
        """A function from an image (path, bytes, Pillow image, uint8 array) to a float32 tensor (3, H, W).

        training: random crops and flips, drawn from `seed` and the number of the call.
        """
        return ImagePipeline(self._config, self.spec.image_size, _to_nchw, training=training, seed=seed)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a model folder that every engine reads; ValueError if it exists (unless `force`)."""
        if (
            self.num_classes != getattr(self.spec, "classes", 0)
            or len(self.layers) != self.spec.encoder.depth
        ):
            raise ValueError("save: expected a complete model, found one without head or with pruned blocks")
        arrays = {name: p.detach().float().cpu().numpy() for name, p in self.named_parameters()}
        return write_model(folder, self.spec, arrays, metadata=self._config.stored(), force=force)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._choose_scan()  # the device may have changed
        return self

    def _choose_scan(self) -> None:
        device = self.patch_embed.weight.device
        if device.type != "meta":
            chosen = choose_scan(scans(str(device)), self._scan)
            for layer in self.layers:
                cast(Block, layer).mixer.scan = chosen

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and recompute the rest."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW must not decay, as in the official recipes."""
        return decay_free(self.spec)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of layers, for layer-wise learning rates as in the official finetuning."""
        # norm_f has the head's rate, as in the official code; in timm's ViT it has that of the last block.
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": r"^layers\.(\d+)"}

    @torch.no_grad()
    def extract(self, images: Array, *, block: int | None = None, pool: str = "default") -> Array:
        """Features of normalized images (B, H, W, 3) as NumPy; see `arm_core.engine.modules.pooled`."""
        like = self.get_parameter("pos_embed")
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(like.device, like.dtype)
        if block is None and pool == "default":
            vector = self.forward_head(self.forward_features(x), pre_logits=True)
            return cast(Array, vector.float().cpu().numpy())
        (found,) = self.forward_intermediates(
            x, [-1 if block is None else block], True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        patches, prefix = found if isinstance(found, tuple) else (found, None)
        arrays = [None if t is None else t.float().cpu().numpy() for t in (patches, prefix)]
        return pooled(cast(Array, arrays[0]), arrays[1], pool, self.spec)

    def influence(self, images: Tensor, layers: Iterable[int] | None = None) -> Influence:
        """How much each token contributes to each other token in every mixer (`arm_core.explain.influence`).

        images: (B, 3, H, W), normalized, of the model's image size.  layers: blocks from 0; None for all.
        The maps are computed on the CPU. Raises ValueError for other sizes and for a layer that does not
        exist.
        """
        from arm_core.explain.influence import influence

        pixels, spec = self._checked(images)
        if spec is not self.spec:
            raise ValueError(f"influence: expected images of {self.spec.image_size}, found {spec.image_size}")
        return influence(_Recorder(self), pixels.detach().float().cpu().numpy(), layers=layers)

    def _record(self, images: Tensor, seen: dict[str, Tensor]) -> None:
        """Run the model on images (B, H, W, C) and note its intermediate tensors."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalized tokens of the last block, (B, T, D) in raster order.

        A classifier has its class token in their middle.
        """
        tokens, order, spec = self._tokens(x)
        return self._in_raster_order(self._last_norm(self._run_blocks(tokens, order)[-1]), spec)

    def forward_intermediates(
        self,
        x: Tensor,
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
            y = self._in_raster_order(self._last_norm(outputs[i]) if norm else outputs[i], spec)
            patches, prefix = without_class_token(y, spec)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).reshape(len(x), -1, *spec.grid)
            maps.append((patches, prefix) if return_prefix_tokens and prefix is not None else patches)
        if intermediates_only:
            return maps
        return self._in_raster_order(self._last_norm(outputs[-1]), spec), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, ModelSpec]:
        """The input of the first block (B, T, D), the order table, and the spec for the images' size."""
        raise NotImplementedError

    def _last_norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _in_raster_order(self, x: Tensor, spec: ModelSpec) -> Tensor:
        return x

    def _checked(self, images: Tensor) -> tuple[Tensor, ModelSpec]:
        """The images as (B, H, W, C) in the type of the weights, and the spec for their size."""
        spec: ModelSpec = spec_for_images(
            self.spec, tuple(images.shape), channels_last=False, dynamic=self.dynamic_image_size
        )
        if not self._images_checked and not transformed():
            self._images_checked = True
            self._warn_of_unnormalized(images)
        if not images.is_floating_point():
            images = images.to(self.get_parameter("pos_embed").dtype)
        return images.permute(0, 2, 3, 1), spec

    @torch.no_grad()
    def _warn_of_unnormalized(self, images: Tensor) -> None:
        largest = float(images.abs().max()) if images.numel() else 0.0
        if not images.is_floating_point() or largest > UNNORMALIZED:
            warnings.warn(
                f"images: found {images.dtype} values up to {largest:g}; the model expects float images "
                "normalized by the mean and std in model.config; use model.transform()",
                stacklevel=5,
            )

    def _run_blocks(self, x: Tensor, order: Tensor, last: int | None = None) -> list[Tensor]:
        """Outputs of the blocks, up to index `last`, on tokens (B, T, D)."""
        scales = self._drop_path_scales(x)
        outputs = []
        for i, layer in enumerate(self.layers):
            if last is not None and i > last:
                break
            scale = None if scales is None else scales[i]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, order, scale, "", None, use_reentrant=False))
            else:
                x = layer(x, order, scale, "", None)
            outputs.append(x)
        return outputs

    def _drop_path_scales(self, x: Tensor) -> Tensor | None:
        """(depth, 2, B) factors of the residual branches, from torch's generator; None outside training."""
        if not self.training or self.drop_path_rate == 0:
            return None
        rates = drop_rates(self.drop_path_rate, self.spec.encoder.depth)
        kept_share = torch.tensor(1.0 - rates, dtype=torch.float32, device=x.device)[:, None, None]
        draws = torch.rand(len(rates), 2, len(x), device=x.device)
        return (draws < kept_share) / kept_share


def _to_nchw(pixels: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class _Recorder:
    """A library model where influence maps expect an engine."""

    def __init__(self, model: LibraryModel) -> None:
        self.spec, self._model = model.spec, model

    @torch.no_grad()
    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        like = self._model.get_parameter("pos_embed")
        seen: dict[str, Tensor] = {}
        self._model._record(torch.from_numpy(images).to(like.device, like.dtype), seen)
        return {name: value.float().cpu().numpy() for name, value in seen.items()}

    def export_state(self) -> TrainingState:
        parameters = {n: p.detach().float().cpu().numpy() for n, p in self._model.named_parameters()}
        return TrainingState(parameters=parameters)
