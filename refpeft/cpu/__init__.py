"""Faster pairs of the fused operations for float32 arrays of NumPy; importing this registers them.

Each is held to the plain pair in refpeft.ops or refpeft.fused by a test. Three things make them fast: memory that was
used before (refpeft.arena), blocks of rows that stay in a core's cache while a chain of ufuncs runs over them, and
nothing computed or copied that nobody reads.
"""

from . import attention, elementwise, linear, losses, norms

__all__ = ["attention", "elementwise", "linear", "losses", "norms"]
