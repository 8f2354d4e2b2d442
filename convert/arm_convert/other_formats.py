"""Formats that `arm export` does not write, and why. `docs/export.md` has the details."""

REASONS = {
    "coreml": (
        "Core ML has no operator for a recurrence with a step of our own that coremltools converts from ONNX "
        "or from torch.export: see docs/export.md; export .onnx and run it with onnxruntime, which has a "
        "Core ML provider for the matrix products"
    ),
    "torch": (
        "torch.export needs the scan as a registered operator, which the torch engine does not have yet: "
        "see docs/export.md; export .onnx instead"
    ),
}
"""One sentence for each format."""
