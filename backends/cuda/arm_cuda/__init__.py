"""The torch engine: NVIDIA GPUs, and any CPU. Importing this package does not import torch."""

from arm_cuda.backend import TorchBackend

backend = TorchBackend()
"""What the entry point `arm_vision.backends` hands to the core."""
