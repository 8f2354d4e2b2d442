"""Models as plain ONNX files, built from the spec and the parameter table without a framework.

`graph.build` creates a file's content, `write.write_onnx` checks and writes it, `compare.compare` measures it
against the model. The packages `onnx` and `onnxruntime` are imported when a function needs them.
"""
