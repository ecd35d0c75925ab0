"""Mask selection and repair: where the sparse part sits, and what it starts from."""
