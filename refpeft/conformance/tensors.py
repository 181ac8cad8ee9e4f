"""Safetensors files with NumPy alone, so that the runner needs nothing else: small files, read and written whole.

The format: eight bytes, little-endian, that say how long the header is; the header, a JSON object {name: {dtype, shape,
data_offsets}}; the data, row-major and little-endian.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ..errors import RefpeftError

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32, which NumPy does not know
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items() if name != "BF16"}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, bfloat16 as float32. RefpeftError where it is no such file, or cannot be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for, a device has no end
            raise ValueError("it is no file")
        data = Path(path).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        if not 8 < start <= len(data):
            raise ValueError(f"its header would end at byte {start:,} of {len(data):,}")
        header = json.loads(data[8:start])
        if not (isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values())):
            raise ValueError("its header is no JSON object of objects")
        return {name: _tensor(name, e, data, start) for name, e in header.items() if name != "__metadata__"}
    except OSError as error:
        raise RefpeftError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefpeftError(f"{path}: not a whole safetensors file: {error}") from None


def _tensor(name: str, entry: dict, data: bytes, start: int) -> np.ndarray:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {kind!r}, expected one of {', '.join(_DTYPES)}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) or len(shape) > 64:
        raise ValueError(f"the shape and place of tensor {name!r} are not whole numbers")
    dtype = np.dtype(_DTYPES[kind])
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > len(data):
        raise ValueError(f"tensor {name!r} of shape {tuple(shape)} does not fit in bytes {begin} to {end} of its data")
    array = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array.copy()


def write(path: str | Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays of NumPy's own dtypes. RefpeftError for any other."""
    header, end = {}, 0
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise RefpeftError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, expected {', '.join(map(str, _NAMES))}"
            )
        kind, shape = _NAMES[array.dtype], list(array.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values()))
