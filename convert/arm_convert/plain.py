"""Exports for plain `torch.nn` or `mlx.nn` modules, in the layouts of each framework.

Names are those of the parameter table, except that each scan direction k has separate tensors, like a
list of modules: `layers.0.mixer.conv.<k>.weight`, `x_proj.<k>.weight`, `dt_proj.<k>.weight` and `.bias`,
`A_log.<k>`, `D.<k>`. Every tensor loads into a standard module:

    tensor                torch.nn                               mlx.nn
    patch_embed           Conv2d(C, D, p, p)     (D, C, p, p)    Conv2d          (D, p, p, C)
    conv.<k>              Conv1d(D, D, W, groups=D)  (D, 1, W)   Conv1d          (D, W, 1)
    all others            Linear (out, in), LayerNorm and plain tensors: the same in both
"""

from __future__ import annotations

from enum import StrEnum

from arm_convert.layouts import SAME, Layout, Row, channels_first_patches, reshaped
from arm_core.model.parameters import Parameter, parameter_table
from arm_core.model.spec import EncoderSpec, ModelSpec


class Framework(StrEnum):
    TORCH = "torch"
    MLX = "mlx"


_PER_DIRECTION = {
    "conv.weight": "conv.{}.weight",
    "conv.bias": "conv.{}.bias",
    "x_proj.weight": "x_proj.{}.weight",
    "dt_proj.weight": "dt_proj.{}.weight",
    "dt_proj.bias": "dt_proj.{}.bias",
    "A_log": "A_log.{}",
    "D": "D.{}",
}

_CONV1D = {
    Framework.TORCH: reshaped(lambda s: (s[0], 1, s[1]), lambda s: (s[0], s[2])),
    Framework.MLX: reshaped(lambda s: (*s, 1), lambda s: s[:2]),
}


def _patches(framework: Framework, spec: EncoderSpec) -> Layout:
    if framework is Framework.TORCH:
        return channels_first_patches(spec.patch, spec.channels)
    return reshaped(
        lambda s: (s[0], spec.patch, spec.patch, spec.channels), lambda s: (s[0], s[1] * s[2] * s[3])
    )


def plain_table(spec: ModelSpec, framework: Framework) -> list[Row]:
    """The correspondence of all tensors of a model, in the order of the parameter table."""
    return [_row(parameter, spec, framework) for parameter in parameter_table(spec).values()]


def _row(parameter: Parameter, spec: ModelSpec, framework: Framework) -> Row:
    name = parameter.name
    prefix, _, leaf = name.partition(".mixer.")
    if leaf in _PER_DIRECTION:
        names = tuple(f"{prefix}.mixer.{_PER_DIRECTION[leaf].format(k)}" for k in range(spec.directions))
        layout = _CONV1D[framework] if leaf == "conv.weight" else SAME
        return Row(name, parameter.shape, names, True, layout)
    layout = _patches(framework, spec.encoder) if name == "patch_embed.weight" else SAME
    return Row(name, parameter.shape, (name,), False, layout)
