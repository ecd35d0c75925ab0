"""Bytes: what each phase of a run takes on the device, on the host and on disk."""
