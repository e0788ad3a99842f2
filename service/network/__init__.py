"""A model as data: the typed network that is proved, written as canonical ONNX, and run."""
