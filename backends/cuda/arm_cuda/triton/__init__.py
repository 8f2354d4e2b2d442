"""Triton kernels of the mixer's two sequence operators, for NVIDIA GPUs.

    availability.py   whether they can run here, and if not, why
    operators.py      the two operators: checks, torch.library registration, gradients
    launch.py         tile sizes, buffers, grids
    scan_kernels.py conv_kernels.py gate_kernels.py arithmetic.py

Importing this package does not import Triton; `operators` does.
"""
