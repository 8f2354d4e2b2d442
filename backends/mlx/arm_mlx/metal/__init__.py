"""The mixer's two sequence operators on Apple GPUs: Metal kernels, forward and backward.

    sources.py     the kernels' text, from the *.metal files beside it, as MLX wants it
    tuning.py      lanes, threads and chunks, with the machine that chose them
    launch.py      one function per kernel: shapes, limits, grid
    operators.py   the kernels joined into differentiable functions

The convolution is a kernel of its own: its result is the input of x_proj and so is written in any case.
Within the scan it would be computed a second time, without saving a byte. Gate and mean over directions
are one more kernel, so that each is applied once, forwards and backwards, whatever the number of
directions. `docs/performance.md` has the counts behind this.
"""

from arm_mlx.metal.operators import directional_conv, selective_scan

__all__ = ["directional_conv", "selective_scan"]
