"""Both models as torch modules whose parameter names and shapes are those of the parameter table.

Sizes in comments: B images, T tokens, D width, E decoder width. Every forward takes `seen`, a dict that
collects the intermediate tensors named in `arm_core.model.reference.model`, or None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from arm_core.model.parameters import parameter_table
from arm_core.model.reference.model import TARGET_EPS
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec, Target
from arm_core.model.tokens import decoder_mask, direction_orders, encoder_patches, target_patches
from arm_cuda.layers import Block, DecoderBlock, Seen, empty, note


def unfold_patches(images: Tensor, patch: int) -> Tensor:
    """(B, H, W, C) -> (B, patches, patch * patch * C), raster order, values (row, column, channel)."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(2, 3).reshape(batch, -1, patch * patch * channels)


class Trunk(nn.Module):
    """Base of both models: patch embedding, blocks, and the order table of their scans."""

    order: Tensor

    def __init__(self, spec: ModelSpec, scan: str) -> None:
        super().__init__()
        encoder = spec.encoder
        self.patch_embed = nn.Linear(encoder.patch_values, encoder.width)
        self.layers = nn.ModuleList(Block(encoder, spec.directions, scan) for _ in range(encoder.depth))
        self.register_buffer("order", torch.from_numpy(direction_orders(spec)), persistent=False)

    def blocks(self, x: Tensor, drop_path_scale: Tensor | None, seen: Seen) -> list[Tensor]:
        """Run all blocks on tokens (B, T, D) and return the output of each."""
        outputs = [note(seen, "tokens", x)]
        for i, layer in enumerate(self.layers):
            scale = None if drop_path_scale is None else drop_path_scale[i]
            outputs.append(layer(outputs[-1], self.order, scale, f"layers.{i}", seen))
        return outputs[1:]


class PretrainModel(Trunk):
    """Predicts the pixels of each cluster from the clusters before it (paper, section 3.2)."""

    encoder_patches: Tensor
    target_patches: Tensor
    mask: Tensor

    def __init__(self, spec: PretrainSpec, scan: str) -> None:
        super().__init__(spec, scan)
        self.spec = spec
        encoder, width = spec.encoder, spec.decoder_width
        self.pos_embed = empty(spec.patches, encoder.width)
        self.tap_norms = nn.ModuleList(nn.LayerNorm(encoder.width, eps=encoder.norm_eps) for _ in spec.taps)
        self.taps_to_decoder = nn.Linear(len(spec.taps) * encoder.width, width * spec.decoder_depth)
        self.decoder_pos_embed = empty(spec.patches, width)
        self.query_token = empty(width)
        self.decoder = nn.ModuleList(DecoderBlock(spec) for _ in range(spec.decoder_depth))
        self.prediction_norm = nn.LayerNorm(width, eps=encoder.norm_eps)
        self.prediction = nn.Linear(width, encoder.patch_values)
        for name, table in (
            ("encoder_patches", encoder_patches(spec)),
            ("target_patches", target_patches(spec)),
            ("mask", decoder_mask(spec)),
        ):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(
        self, images: Tensor, drop_path_scale: Tensor | None = None, seen: Seen = None
    ) -> dict[str, Tensor]:
        spec = self.spec
        patches = unfold_patches(images, spec.encoder.patch)
        tokens = self.patch_embed(patches[:, self.encoder_patches]) + self.pos_embed[self.encoder_patches]
        outputs = self.blocks(tokens, drop_path_scale, seen)

        taps = [norm(outputs[i - 1]) for norm, i in zip(self.tap_norms, spec.taps, strict=True)]
        joined = note(seen, "taps_to_decoder", self.taps_to_decoder(torch.cat(taps, dim=-1)))
        latents = torch.unflatten(joined, -1, (spec.decoder_width, spec.decoder_depth))  # (B, T, E, blocks)

        x = (self.query_token + self.decoder_pos_embed[self.target_patches]).expand(images.shape[0], -1, -1)
        note(seen, "queries", x)
        for j, (block, latent) in enumerate(zip(self.decoder, latents.unbind(-1), strict=True)):
            x = note(seen, f"decoder.{j}", block(x, latent, self.mask))
        prediction = self.prediction(self.prediction_norm(x))
        loss = (prediction.float() - self.target(patches)).square().mean((0, 2))
        return {
            "decoder_input": latents,
            "prediction": prediction,
            "loss_per_token": loss,
            "loss": loss.mean(),
        }

    def target(self, patches: Tensor) -> Tensor:
        """The targets of the decoder, (B, T, patch values) float32."""
        target = patches[:, self.target_patches]
        if self.spec.target is Target.RAW:
            return target
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
        return (target - mean) * torch.rsqrt(variance + TARGET_EPS)


class Classifier(Trunk):
    """Classifies an image from K scans of its patches around a class token."""

    def __init__(self, spec: ClassifierSpec, scan: str) -> None:
        super().__init__(spec, scan)
        self.spec = spec
        width = spec.encoder.width
        self.cls_token = empty(width)
        self.pos_embed = empty(spec.tokens, width)
        self.norm_f = nn.LayerNorm(width, eps=spec.encoder.norm_eps)
        self.head = nn.Linear(width, spec.classes)

    def forward(
        self, images: Tensor, drop_path_scale: Tensor | None = None, seen: Seen = None
    ) -> dict[str, Tensor]:
        x = self.embed(images, self.pos_embed)
        x = note(seen, "norm_f", self.norm_f(self.blocks(x, drop_path_scale, seen)[-1]))
        features = self.pool(x)
        return {"features": features, "logits": self.head(features)}

    def embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T, D) of images (B, H, W, C), the class token in their middle. positions: (T, D)."""
        x = self.patch_embed(unfold_patches(images, self.spec.encoder.patch))
        middle = x.shape[1] // 2
        token = self.cls_token.to(x.dtype).expand(x.shape[0], 1, -1)
        return torch.cat([x[:, :middle], token, x[:, middle:]], dim=1) + positions

    def pool(self, x: Tensor) -> Tensor:
        """The vector before the head, (B, D), of normalized tokens (B, T, D)."""
        middle = (x.shape[1] - 1) // 2
        if self.spec.pooling is Pooling.MEAN:
            return (x[:, :middle].mean(1) + x[:, middle + 1 :].mean(1)) / 2
        return x[:, middle]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of -sum(targets * log_softmax(logits)). logits, targets: (B, classes)."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def build_model(spec: ModelSpec, scan: str, device: torch.device) -> PretrainModel | Classifier:
    """The model without values; its names and shapes are checked against the parameter table."""
    with torch.device("meta"):  # nothing is initialised: the core provides the values
        model = PretrainModel(spec, scan) if isinstance(spec, PretrainSpec) else Classifier(spec, scan)
    table = parameter_table(spec)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: row.shape for name, row in table.items()}, "model and parameter table differ"
    model.load_state_dict({name: torch.empty(s, device=device) for name, s in shapes.items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table[name].trainable)
    return model.to(device)  # the integer tables
