"""Activations, sums and dropout, for float32 arrays of NumPy."""
