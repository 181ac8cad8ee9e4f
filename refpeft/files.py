"""Files written whole or not at all, and safetensors and JSON files of others read without trusting them."""

import json
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from refpeft.errors import RefpeftError

# The names that the safetensors format gives to what NumPy can hold, in the order of the library: it writes tensors of
# later ones first, so that each lies at a multiple of its size.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PIECE = 1 << 20  # bytes that are copied at a time


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the body to write; it takes the name `path` once it is safely on the disk.

    A reader, or a run after a kill at any moment, sees the old file or the whole new one. If the body fails, nothing
    stays. Devices and pipes are written as they are.
    """
    path = Path(path)
    if _is_special(path):
        with named(path):
            yield path
        return
    temporary = _sibling(path)
    try:
        with named(path, temporary):
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, or /dev/stdout: a file in its place would be its end for all programs."""
    if path.is_symlink() and os.readlink(path).startswith("/proc/self/fd/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Within it, an OSError that names no file (the disk is full), or one in `temporary`, is one about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (temporary and Path(str(error.filename)).is_relative_to(temporary)):
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are a ValueError: JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays (NumPy's dtypes and ml_dtypes.bfloat16) as a safetensors file, atomically."""
    places = {
        name: (_name_of_dtype(path, name, array), list(array.shape), array.nbytes) for name, array in tensors.items()
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        for name in _write_header(file, places, metadata):
            file.write(_bytes(tensors[name]))


@contextmanager
def safetensors_writer(
    path: str | Path, metadata: dict[str, str] | None = None
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A function (name, array) that adds a tensor to a safetensors file, which is there, atomically, after the body.

    Only one tensor at a time need be in memory. The file is, byte for byte, what write_safetensors makes of all of
    them: they wait in a second temporary file until their places are known.
    """
    path = Path(path)
    waiting, places, starts = _sibling(path), {}, {}
    try:
        with named(path, waiting), open(waiting, "w+b") as spool:

            def write(name: str, array: np.ndarray) -> None:
                places[name] = _name_of_dtype(path, name, array), list(array.shape), array.nbytes
                starts[name] = spool.tell()
                spool.write(_bytes(array))

            yield write
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                for name in _write_header(file, places, metadata):
                    spool.seek(starts[name])
                    size = places[name][2]
                    for piece in range(0, size, _PIECE):
                        file.write(spool.read(min(_PIECE, size - piece)))
    finally:
        waiting.unlink(missing_ok=True)


def _write_header(
    file: IO[bytes], places: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None
) -> list[str]:
    """Writes the header of a safetensors file for tensors of these dtypes, shapes and bytes; gives their order."""
    ranks = list(_DTYPES)
    order = sorted(places, key=lambda name: (-ranks.index(places[name][0]), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        kind, shape, size = places[name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return order


def _bytes(array: np.ndarray) -> memoryview:
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _name_of_dtype(path: str | Path, name: str, array: np.ndarray) -> str:
    if array.dtype not in _NAMES:
        raise RefpeftError(
            f"{path}: tensor {name!r} has dtype {array.dtype}, which refpeft does not write; "
            "convert it to float32, float16 or bfloat16"
        )
    return _NAMES[array.dtype]


@contextmanager
def replace_directory(path: str | Path) -> Iterator[Path]:
    """An empty directory beside `path`, for the body to fill; it takes the name `path` once it is safely on the disk.

    If the body fails, it is removed and an earlier `path` stays. No system call swaps two directories everywhere, so an
    earlier `path` is renamed out of the way first: a kill between the two renames leaves both directories whole, under
    hidden names.
    """
    path = Path(path)
    temporary, old = _sibling(path), _sibling(path)
    try:
        with named(path, temporary):
            temporary.mkdir(parents=True)
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path) -> Path:
    """A hidden name that nothing has yet, in the same directory, so that a rename stays within one file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading --------------------------------------------------------------------------------------------------------------


def expanded(path: str) -> Path:
    """`path` with ~ as the home directory, where there is one: Path.expanduser raises where there is none."""
    return Path(os.path.expanduser(path))


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. RefpeftError if there is no such file or it holds anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise RefpeftError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RefpeftError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RefpeftError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name: read-only arrays mapped from the file, read from disk only when used.

    Raises RefpeftError, naming the file (and the tensor where one is at fault), for a file that is truncated, corrupt,
    overlapping or of a dtype that NumPy and ml_dtypes lack. Nothing is allocated on the word of the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        header, start, size = _read_header(Path(path))
        for name, entry in header.items():
            _check_entry(path, name, entry, size - start)
        with safe_open(path, framework="numpy"):
            pass  # opening checks the rest: no holes, no overlaps, no bytes left over
    except SafetensorError as error:
        raise RefpeftError(f"{path}: not a valid safetensors file: {error}; download or copy it again") from None
    except OSError as error:
        raise RefpeftError(f"{path}: cannot be read: {error.strerror or error}") from None

    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=0))
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[start + begin : start + end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def let_go(array: np.ndarray) -> None:
    """Gives up the memory that holds what was read of a mapped array; it is read from the file again when it is used.

    Nothing happens to an array that is not mapped from a file.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not array.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = np.frombuffer(base, np.uint8).ctypes.data
    begin = (low - start) // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, begin, high - start - begin)


def _read_header(path: Path) -> tuple[dict[str, dict], int, int]:
    """The header without its metadata, the offset of the data, the size of the file."""
    corrupt = f"{path}: not a valid safetensors file: "
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            found = f"its header should have {length} bytes, the file has {size}"
            raise RefpeftError(f"{corrupt}{found}; download or copy it again")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise RefpeftError(f"{corrupt}its header is not JSON: {error}; download or copy it again") from None
    if not isinstance(header, dict):
        raise RefpeftError(f"{corrupt}its header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def _refuse_duplicates(pairs: list[tuple]) -> dict:
    """A JSON object in which no key stands twice (two parsers may pick different ones)."""
    names = dict(pairs)
    if len(names) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return names


def _check_entry(path: str | Path, name: str, entry, available: int) -> None:
    """Raise if one tensor's dtype, shape and place in the file do not fit together."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise RefpeftError(f"{where}: expected an entry with dtype, shape and data_offsets; the file is corrupt")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise RefpeftError(
            f"{where} has dtype {dtype!r}; refpeft reads {', '.join(_DTYPES)}; convert it to one of them"
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise RefpeftError(f"{where}: shape and data_offsets must be lists of whole numbers; the file is corrupt")
    # NumPy's limits hold for empty arrays too; checked first, because the product of a million huge numbers is slow.
    if len(shape) > 64 or math.prod(max(side, 1) for side in shape) > 2**59:
        raise RefpeftError(f"{where}: its shape is too big for any array; the file is corrupt")
    begin, end = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise RefpeftError(f"{where} needs {needed} bytes by its shape, not {end - begin}; the file is corrupt")
    if end > available:
        raise RefpeftError(f"{where} ends at byte {end}, the file holds {available}; download or copy it again")


def _whole_numbers(value) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
