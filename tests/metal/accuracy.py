"""Errors of the kernels against float64: results and all gradients, relative to each tensor's largest value.

python tests/metal/accuracy.py      the table of docs/performance.md: on an Apple GPU, or emulated
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np
import problems
from problems import BY_TOKEN, CONV, SCAN, Arrays, Case

from arm_mlx import scan

TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}
"""16-bit results are rounded to 11 and 8 bits; the state is float32 in any case."""
LENGTHS = (1, 7, 37, 128, 197, 577)
WIDTHS = (40, 192, 768, 1536)
COLUMNS = ("u", "grad x", "weight", "bias", "out", "grad u", "dt", "A", "B", "C", "D", "dt_bias", "z")

Found = tuple[mx.array, list[mx.array]]


def rounded(values: Arrays, dtype: mx.Dtype) -> Arrays:
    """The arrays as float32 after rounding to dtype, which are the values that the kernels read."""
    return {
        name: np.asarray(mx.array(a).astype(dtype).astype(mx.float32)) if name in BY_TOKEN else a
        for name, a in values.items()
    }


def run(operator: str, values: Arrays, grad: np.ndarray, dtype: mx.Dtype) -> Found:
    """Result and gradients of an operator of `arm_mlx.scan` with the Metal kernels.

    x and z are halves of wider arrays, as in the model.
    """
    names = CONV if operator == "directional_conv" else SCAN
    arrays = [mx.array(values[n]).astype(dtype) if n in BY_TOKEN else mx.array(values[n]) for n in names]
    arrays = [half_of_wider(a) if n in ("x", "z") else a for n, a in zip(names, arrays, strict=True)]
    order = mx.array(values["order"])
    function = getattr(scan, operator)
    (result,), grads = mx.vjp(
        lambda *a: function(*a, order, impl="metal"), arrays, [mx.array(grad).astype(dtype)]
    )
    assert [a.dtype for a in (result, *grads)] == [dtype, *(a.dtype for a in arrays)]
    return result, grads


def half_of_wider(array: mx.array) -> mx.array:
    """The same values, with other values between the rows."""
    wide = mx.concatenate([array, array + 1], axis=-1)
    mx.eval(wide)
    return mx.split(wide, 2, axis=-1)[0]


def errors(case: Case, dtype: mx.Dtype, *, large_steps: bool = False) -> dict[str, float]:
    """Largest error of every tensor relative to its largest value, by COLUMNS name; NaN if not finite."""
    values = rounded(problems.inputs(case, large_steps=large_steps), dtype)
    found: dict[str, float] = {}
    rng = np.random.default_rng(1)
    for operator, exact, names in (
        ("directional_conv", problems.conv, ("u", "grad x", *CONV[1:])),
        ("selective_scan", problems.scan, ("out", "grad u", *SCAN[1:])),
    ):
        shape = values["u" if operator == "directional_conv" else "z"].shape
        grad = np.asarray(mx.array(rng.standard_normal(shape)).astype(dtype).astype(mx.float32))
        expected, grads = exact(values, grad)
        result, own_grads = run(operator, values, grad, dtype)
        pairs = zip([result, *own_grads], [expected, *grads.values()], strict=True)
        found |= {name: relative(*pair) for name, pair in zip(names, pairs, strict=True)}
    return found


def relative(found: mx.array, expected: np.ndarray) -> float:
    array = np.asarray(found.astype(mx.float32)).astype(np.float64)
    assert array.shape == expected.shape
    return float(np.abs(array - expected).max() / max(np.abs(expected).max(), 1e-30))


def sweep() -> Iterable[tuple[Case, mx.Dtype]]:
    """Every length with every width, with one direction and, at two widths, four."""
    for length, channels in itertools.product(LENGTHS, WIDTHS):
        directions = 4 if channels in (40, 192) else 1
        for dtype in (mx.float32, mx.bfloat16):
            yield Case(directions=directions, length=length, channels=channels), dtype


def main() -> None:
    if not mx.metal.is_available():
        from emulator import Emulator, missing

        from arm_mlx.metal import launch

        if reason := missing():
            sys.exit(reason)
        launch.execute = Emulator().execute
    worst: dict[tuple[int, int, mx.Dtype], dict[str, float]] = {}
    for case, dtype in sweep():
        worst[case.length, case.channels, dtype] = errors(case, dtype)
        print(
            f"{case} {dtype}: {max(worst[case.length, case.channels, dtype].values()):.1e}", file=sys.stderr
        )
    for dtype, unit in ((mx.float32, 1e-7), (mx.bfloat16, 1e-3)):
        print(f"\n{str(dtype).split('.')[-1]}, errors in {unit:.0e}\n")
        print("| length | width | " + " | ".join(COLUMNS) + " |")
        print("|---" * (2 + len(COLUMNS)) + "|")
        for (length, width, of), row in worst.items():
            if of == dtype:
                cells = (f"{row[name] / unit:.1f}" for name in COLUMNS)
                print(f"| {length} | {width} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
