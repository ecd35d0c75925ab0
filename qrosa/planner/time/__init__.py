"""Seconds: the operations and copies of a step, and how long a card takes for them."""
