"""ONNX Runtime: which device runs a graph, with which session options, and how its failures are told apart."""
