"""Keeping on the host what the card does not need now: boundary activations, and layers of the base."""
