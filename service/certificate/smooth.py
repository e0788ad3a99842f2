"""Rules of activations that a runtime computes with transcendental functions. Notation as in `rules`."""
