"""Capacity: what one machine answers, a queueing model of it, and what the model says of a thousand."""
