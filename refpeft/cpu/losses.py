"""Cross-entropy, for float32 arrays of NumPy."""
