"""Scopes of an API key."""

PREDICT = "predict"
"""Predictions and the models that make them."""
METRICS = "metrics"
"""`/metrics`."""
ADMIN = "admin"
"""Everything, also paths to come that change the server."""
SCOPES = (PREDICT, METRICS, ADMIN)
