"""Adapters: the quantised linear layer, how it gets into a model, and how the budget is split."""
