"""The base: checkpoints in every supported format, read tensor by tensor and quantised on the way."""
