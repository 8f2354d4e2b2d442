"""The mixer's two sequence operators on Apple GPUs: Metal kernels, forward and backward.

    sources.py     the kernels' text for MLX, from the *.metal files
    tuning.py      lanes, threads and chunks, and the machine on which they were chosen
    launch.py      one function per kernel: shapes, limits, grid
    operators.py   the kernels joined into differentiable functions

The convolution is a separate kernel: its result is the input of x_proj and must be written in any case.
The scan would have to compute it a second time, without saving a byte. The gate and the mean over
directions are a third kernel, so that each is applied once, forward and backward, for any number of
directions. See the counts in `docs/performance.md`.
"""

from arm_mlx.metal.operators import directional_conv, selective_scan

__all__ = ["directional_conv", "selective_scan"]
