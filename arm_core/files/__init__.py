"""Models on the disk: safetensors, model folders, headers, quantized tensors. Imports model."""
