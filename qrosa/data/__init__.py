"""Data: rows from files, rows to tokens, tokens to micro-batches."""
