"""The sparse delta: its layout in memory and the adapter files on disk."""
