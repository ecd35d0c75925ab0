"""Memory: what each phase of a run takes, computed from a model's shape before anything is loaded."""
