"""Training: the loss, the optimizer, the schedule, the loop, checkpoints and the report of a run."""
