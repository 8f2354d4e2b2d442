"""The MLX engine: Apple GPUs, and any CPU. Importing this package does not import MLX."""

from arm_mlx.backend import MlxBackend

backend = MlxBackend()
"""What the entry point `arm_vision.backends` hands to the core."""
