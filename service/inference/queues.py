"""TODO: service/inference/queues.py."""

from __future__ import annotations

# Bytes of requests that one worker decodes before it computes: a large file does not make many small ones wait.
DECODED_BYTES = 1024 * 1024
# A search keeps this share of a forward batch: each image of it costs several passes, and predictions wait for one.
SEARCH_SHARE = 2
# So many batches of predictions go before a search that waits,
MOST_IN_A_ROW = 4
# and images that wait for a search have at most so many times the pixels that share a pass.
WAITING_BATCHES = 16
