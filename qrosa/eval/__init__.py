"""Evaluation: loss, accuracy on short completions, and generated text."""
