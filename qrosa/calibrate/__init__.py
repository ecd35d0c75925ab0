"""A better 4-bit base: rounding with error feedback, calibrated on rows, with its repair beside it."""
