"""RMSNorm and LayerNorm, for float32 arrays of NumPy."""
