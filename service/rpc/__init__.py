"""The Open Inference Protocol over gRPC: each call is a request of `/v2` to the same application."""
