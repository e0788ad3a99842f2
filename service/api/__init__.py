"""The HTTP interface: bytes to requests, answers to responses, errors to problem documents."""
