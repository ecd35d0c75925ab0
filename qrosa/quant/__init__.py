"""The frozen base as packed 4-bit weights."""
