"""Optimizers of the adapter's parameters, and the schedules of their learning rates."""
