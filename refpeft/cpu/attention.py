"""Attention and rotary positions, for float32 arrays of NumPy."""
