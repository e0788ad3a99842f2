"""1-Lipschitz networks: layers with a known constant that write themselves as ONNX nodes, and their assembly."""
