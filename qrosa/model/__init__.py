"""The only seam to transformers' model classes: hidden states and head, modes, device."""
