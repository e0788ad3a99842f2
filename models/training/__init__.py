"""Training of a network: batches, losses, optimisers, the loop with its checkpoints and curves, several processes."""
