"""What a run leaves on disk while it trains: its folder, checkpoints, state, memory peaks, trackers."""
