"""Products with frozen and trained matrices, for float32 arrays of NumPy."""
