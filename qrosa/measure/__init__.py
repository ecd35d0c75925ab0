"""Measuring: the real training step under fake tensors (simulate), or for real at the longest rows (probe)."""
