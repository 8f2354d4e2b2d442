"""Cost of a model by part, from its spec: parameters, multiply-adds and kept activations.

Multiply-adds are those of one image through one forward pass: every matrix product, the convolution
(one per channel and weight), and four per channel, state and step of the scan (dt A, the state's update,
its input, C h). Norms, gates, exponentials and sums are not counted. A training step costs about three
forward passes.

Activations are the values that a training step keeps for the gradients: the inputs of every product, norm
and activation function, and for the scan its operands and one state every `CHECKPOINT` steps. An engine
that recomputes more keeps fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from arm_core.model.parameters import parameter_table
from arm_core.model.spec import TAP_DEPTHS, ClassifierSpec, ModelSpec, PretrainSpec

CHECKPOINT = 16
"""Steps between the states that a scan's forward pass keeps."""

OPTIMIZER_BYTES = 16
"""Float32 weight, gradient and two AdamW moments of a trainable value."""


EMA_BYTES = 4
"""Float32 moving average of a trainable value."""

SPARE = 0.9
"""Fraction of a device's memory that a step can use; the rest is for libraries and temporary values."""


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """One row of the table: a kind of layer, summed over its copies."""

    name: str
    parameters: int
    """Trainable values."""
    fixed: int
    """Values of position tables that are never updated."""
    multiply_adds: int
    """Per image, forward."""
    activations: int
    """Values kept per image by a training step."""


PATTERNS: dict[str, tuple[str, ...]] = {
    "patch embedding": ("patch_embed.*", "pos_embed", "cls_token"),
    "block norms": ("layers.*.norm?.*",),
    "mixer projections": (
        "layers.*.mixer.in_proj.*",
        "layers.*.mixer.x_proj.*",
        "layers.*.mixer.dt_proj.weight",
        "layers.*.mixer.out_proj.*",
    ),
    "mixer convolution": ("layers.*.mixer.conv.*",),
    "mixer scan": ("layers.*.mixer.dt_proj.bias", "layers.*.mixer.A_log", "layers.*.mixer.D"),
    "block MLPs": ("layers.*.mlp.*",),
    "taps to decoder": ("tap_norms.*", "taps_to_decoder.*"),
    "decoder attention": (
        "decoder_pos_embed",
        "query_token",
        "decoder.*.norm_query.*",
        "decoder.*.norm_latent.*",
        "decoder.*.attention.*",
    ),
    "decoder MLPs": ("decoder.*.norm_mlp.*", "decoder.*.mlp.*"),
    "prediction": ("prediction_norm.*", "prediction.*"),
    "head": ("norm_f.*", "head.*"),
}
"""Parts by name, with patterns of their parameters; every parameter matches exactly one part."""


def cost_table(spec: ModelSpec) -> list[PartCost]:
    """The parts of a model, in the order of the data flow."""
    work = {**_trunk(spec), **(_decoder(spec) if isinstance(spec, PretrainSpec) else _head(spec))}
    rows = []
    for name, (multiply_adds, activations) in work.items():
        owned = [row for row in parameter_table(spec).values() if _part_of(row.name) == name]
        rows.append(
            PartCost(
                name=name,
                parameters=sum(row.size for row in owned if row.trainable),
                fixed=sum(row.size for row in owned if not row.trainable),
                multiply_adds=multiply_adds,
                activations=activations,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory in bytes of a training step on one device."""

    state: int
    """Weights, gradients, moments and average."""
    per_image: int
    """Values kept for the gradients, per image."""
    passing: int
    """Temporary values per image, while a block is recomputed."""

    def total(self, images: int) -> int:
        """The total with a micro-batch of `images`."""
        return self.state + images * (self.per_image + self.passing)

    def fitting(self, available: int) -> int:
        """Images in the largest micro-batch for a device of `available` bytes; 0 if not even one fits."""
        return max(0, int((SPARE * available - self.state) // (self.per_image + self.passing)))


def step_memory(
    spec: ModelSpec, *, value_bytes: int = 4, average: bool = False, recompute: bool = False, shards: int = 1
) -> StepMemory:
    """Memory of a training step.

    value_bytes: size of a kept value, 2 with bfloat16 products.  average: whether an EMA is kept.
    recompute: blocks keep only their input (float32).  shards: devices that share the state.
    """
    parts = cost_table(spec)
    fixed = 4 * sum(part.fixed for part in parts)
    each = OPTIMIZER_BYTES + (EMA_BYTES if average else 0)
    kept = {part.name: value_bytes * part.activations for part in parts}
    per_image, passing = sum(kept.values()), 0
    if recompute:
        encoder = spec.encoder
        blocks = sum(size for name, size in kept.items() if name.startswith(("block ", "mixer ")))
        inputs = 4 * encoder.depth * spec.tokens * encoder.width
        per_image, passing = per_image - blocks + inputs, blocks // encoder.depth
    state = (each * sum(part.parameters for part in parts) + fixed) // shards
    return StepMemory(state=state, per_image=per_image, passing=passing)


def _part_of(parameter: str) -> str:
    (part,) = [p for p, patterns in PATTERNS.items() if any(fnmatch(parameter, one) for one in patterns)]
    return part


Work = dict[str, tuple[int, int]]
"""Part -> (multiply-adds, kept values), per image."""


def _trunk(spec: ModelSpec) -> Work:
    encoder = spec.encoder
    width, state, rank, mlp = encoder.width, encoder.state, encoder.dt_rank, encoder.mlp_width
    # A pretraining model embeds the patches that it reads, a classifier all tokens except the class token.
    patches = spec.tokens if isinstance(spec, PretrainSpec) else spec.patches
    per_block = encoder.depth * spec.tokens
    scanned = per_block * spec.directions  # steps of the scan over the whole depth
    low = rank + 2 * state  # dt before its second product, B and C
    return {
        "patch embedding": (patches * encoder.patch_values * width, patches * encoder.patch_values),
        "block norms": (0, per_block * 2 * width),
        "mixer projections": (
            per_block * (2 * width + width) * width + scanned * (width * low + rank * width),
            per_block * 2 * width + scanned * low,
        ),
        # Keeps its input x; the scan keeps its output u.
        "mixer convolution": (scanned * width * encoder.conv_width, per_block * width),
        # u, dt and every CHECKPOINT-th state for each direction; the gate z and the mean that it scales.
        "mixer scan": (
            scanned * 4 * width * state,
            scanned * (2 * width + width * state // CHECKPOINT) + per_block * 2 * width,
        ),
        # The two products and the output of the gate, whose silu is recomputed.
        "block MLPs": (per_block * 3 * width * mlp, per_block * (width + 3 * mlp)),
    }


def _decoder(spec: PretrainSpec) -> Work:
    width, tokens, patch = spec.decoder_width, spec.tokens, spec.encoder.patch_values
    taps = len(TAP_DEPTHS) * spec.encoder.width
    blocks = spec.decoder_depth * tokens
    return {
        # The inputs of the norms are outputs of blocks; the next block keeps them, except after the last one.
        "taps to decoder": (tokens * taps * width * spec.decoder_depth, tokens * (taps + spec.encoder.width)),
        # Query, key and value, and the output again after the heads are joined; masked scores are computed
        # as well.
        "decoder attention": (
            blocks * (4 * width * width + 2 * tokens * width),
            blocks * (2 * 2 * width + 5 * width),
        ),
        "decoder MLPs": (blocks * 8 * width * width, blocks * (2 * width + 8 * width)),
        "prediction": (tokens * width * patch, tokens * (2 * width + patch)),
    }


def _head(spec: ClassifierSpec) -> Work:
    width = spec.encoder.width
    return {"head": (width * spec.classes, spec.tokens * width + width)}
