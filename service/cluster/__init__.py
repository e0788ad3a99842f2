"""Serving on a Ray cluster: the application in replicas of Ray Serve, and a local cluster for a laptop."""
