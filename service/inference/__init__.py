"""From images to answers: loaded models, batching, forward passes and searches for counterfactuals."""
