"""A stand-in for CuPy on a machine without a GPU: arrays that only its own functions take and the host cannot read.

It is where refpeft looks for CuPy within `installed()`, and in a test of pytest after `install(monkeypatch)`. As with
CuPy, a host array beside a device array is a TypeError, and so is a NumPy function of a device array. Within
`capture()`, reading a value (bool, float, int, item, tolist, iteration, a boolean index, nonzero, asnumpy) raises
HostRead, as it would break the capture of a step in a CUDA graph. So does bringing an array from the host, with
`capture(uploads=False)`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_CONVERTING = ("asarray", "array")
_READING = ("nonzero", "flatnonzero", "argwhere", "unique", "array_equal", "allclose", "isscalar")


class HostRead(RuntimeError):
    """A value of the device was asked for by the host."""


_capturing = False
_uploads = True


@contextlib.contextmanager
def capture(uploads: bool = True) -> Iterator[None]:
    """Within it, the host must not read; nor, unless `uploads`, bring arrays."""
    global _capturing, _uploads
    _capturing, _uploads = True, uploads
    try:
        yield
    finally:
        _capturing, _uploads = False, True


def _reads(what: Any) -> None:
    if _capturing:
        raise HostRead(f"the host reads a value of the device: {what}")


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """A device array: a NumPy array inside, out of reach."""

    def __init__(self, host: np.ndarray):
        self._host = host

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy asks for __array_interface__, by which it would see inside
            raise AttributeError(name)
        value = getattr(self._host, name)
        if not callable(value):
            return _device(value)
        return lambda *args, **options: _device(value(*_host(args), **_host(options)))

    def __getitem__(self, key: Any) -> Any:
        return _device(self._host[_index(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_index(key)] = _host(value)

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"<device {self.dtype}{list(self.shape)}>"

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple = (), **options: Any) -> Any:
        if out:
            options["out"] = _host(out)
        result = getattr(ufunc, method)(*_host(inputs), **options)
        return out[0] if out else _device(result)

    def __array_function__(self, function: Callable, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a device array: use the function of xp_of(array)")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("a device array does not become a NumPy array by itself")


def _reading(name: str) -> Callable:
    def method(self: Array, *args: Any) -> Any:
        _reads(f"{name} of {self!r}")
        return getattr(self._host, name)(*args)

    return method


for _name in ("__bool__", "__float__", "__int__", "__index__", "__complex__", "__iter__", "item", "tolist", "tobytes"):
    setattr(Array, _name, _reading(_name))


class Module:
    """NumPy's functions for device arrays, under CuPy's conventions."""

    ndarray = Array

    def __init__(self, target: Any, name: str = "device"):
        self._target, self._name = target, name

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return value if isinstance(value, type) or np.isscalar(value) else Module(value, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._name in _READING:
            _reads(self._name)
        if self._name in _CONVERTING and not _uploads and isinstance(args[0], np.ndarray | list | tuple):
            _reads("none, but an array is brought from the host")
        convert = _plain if self._name in _CONVERTING else _host
        result = self._target(*convert(args), **convert(options))
        return _device(result.copy("K") if self._name in _CONVERTING and isinstance(args[0], np.ndarray) else result)

    @staticmethod
    def get_array_module(*arrays: Any) -> Any:
        return module if any(isinstance(array, Array) for array in arrays) else np

    @staticmethod
    def asnumpy(array: Array) -> np.ndarray:
        _reads("asnumpy")
        return array._host.copy()


module = Module(np)


def install(monkeypatch: Any) -> Module:
    """Until the end of a test of pytest."""
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@contextlib.contextmanager
def installed() -> Iterator[Module]:
    """Within it, for code that is no test."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = module
    try:
        yield module
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before


def _device(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(map(_device, value))  # svd gives a tuple with names
    return Array(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def _host(value: Any) -> Any:
    """What is inside of device arrays; a host array among them is what CuPy does not take."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"a host array {value.dtype}{list(value.shape)} where a device array is expected")
    return _inside(value, _host)


def _plain(value: Any) -> Any:
    return _inside(value, _plain)


def _inside(value: Any, recurse: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(recurse, value))
    if isinstance(value, dict):
        return {name: recurse(one) for name, one in value.items()}
    return value._host if isinstance(value, Array) else value


def _index(key: Any) -> Any:
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, Array) and part.dtype == bool for part in parts):
        _reads("a boolean index, for how many elements it picks")
    return _host(key) if _capturing else _plain(key)  # host indices are copied over, which no graph can hold
