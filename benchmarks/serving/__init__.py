"""How fast the service is beside what it could be (ONNX Runtime alone) and beside other servers of the same graph."""
