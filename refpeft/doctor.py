"""What of refpeft works on this machine, what does not, and the pip line that brings it: `refpeft doctor`.

`obstacle` is the part of it that every run on a GPU begins with.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refpeft import __version__

OK, MISSING, BROKEN = "ok", "missing", "broken"

_NEEDED = ("ml_dtypes", "safetensors", "tokenizers", "click", "pluggy", "jinja2", "pydantic", "rich", "threadpoolctl")
_EXTRAS = {
    "gguf": (("gguf",), "quantized GGUF files are written"),
    "metrics": (("sacrebleu", "rouge-score"), "--metrics sacrebleu and rouge"),
}
_OLDEST = (14, 2)  # CuPy's release from which on NumPy 2.5 and bfloat16 are known
_BFLOAT16_FROM = 80  # compute capability of the first tensor cores that multiply bfloat16


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state   OK; MISSING, of what is not there and need not be; BROKEN, of what is there, or is needed, and does not work
    said    what was found
    remedy  what to do about it: most often a line for pip
    """

    what: str
    state: str
    said: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All that can be said of this machine. Nothing is installed, and nothing stays changed."""
    return [*_here(), *_gpu(), *_extras()]


def text(found: list[Finding]) -> str:
    """For people."""
    states, names = (max(map(len, column)) for column in zip(*((f.state, f.what) for f in found), strict=True))
    lines = []
    for finding in found:
        lines.append(f"{finding.state:<{states}}  {finding.what:<{names}}  {finding.said}")
        if finding.remedy:
            lines.append(f"{'':{states + names + 4}}{finding.remedy}")
    return "\n".join(lines) + "\n"


def obstacle() -> str | None:
    """Why `--device cuda` cannot be used here, with what helps, in one line; None where it can."""
    for look in (_cupy, _device, _headers):
        found = look()
        if found.state != OK:
            return f"{found.said}: {found.remedy}"
    return None


# ---- Python and its libraries ----------------------------------------------------------------------------------------


def _here() -> Iterator[Finding]:
    yield Finding("Python", OK, f"{platform.python_version()}, {sys.executable}")
    yield Finding("refpeft", OK, f"{__version__}, {Path(__file__).parent}")
    yield _tried("NumPy", _numpy, "pip install --force-reinstall numpy")
    absent = [name for name in _NEEDED if _version(name) is None]
    if absent:
        yield Finding("libraries", BROKEN, f"{', '.join(absent)} missing", f"pip install {' '.join(absent)}")
    else:
        yield Finding("libraries", OK, ", ".join(f"{name} {_version(name)}" for name in _NEEDED))


def _numpy() -> Finding:
    import numpy
    import threadpoolctl

    blas = [found for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]
    libraries = [f"{b['internal_api']} {b['version'] or ''}".strip() + f", {b['num_threads']} threads" for b in blas]
    return Finding("NumPy", OK, f"{numpy.__version__}; {'; '.join(libraries) or 'its BLAS does not tell its name'}")


def _extras() -> Iterator[Finding]:
    for extra, (packages, purpose) in _EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        if all(versions.values()):
            yield Finding(extra, OK, ", ".join(f"{name} {version}" for name, version in versions.items()))
        else:
            absent = [name for name, version in versions.items() if version is None]
            yield Finding(extra, MISSING, f"{', '.join(absent)}: {purpose}", f"pip install 'refpeft[{extra}]'")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- up to the GPU ---------------------------------------------------------------------------------------------------


def _cupy() -> Finding:
    wheels = _wheels()
    if len(wheels) > 1:
        said = f"{' and '.join(wheels)} are both installed and overwrite each other's files"
        again = f"pip uninstall -y {' '.join(wheels)}; {_install(_extra_for_driver())}"
        return Finding("CuPy", BROKEN, said, again)
    name, version = next(iter(wheels.items()), ("cupy", ""))
    if not version and "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return Finding("CuPy", MISSING, "CuPy is not installed", _install(_extra_for_driver()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that refpeft does without
            import cupy  # noqa: F401
    except Exception as error:  # whatever a broken library raises
        again = f"pip uninstall -y {name}; {_install(_extra_of(name))}"
        return Finding("CuPy", BROKEN, f"{name} {version} cannot be imported ({_line(error)})", again)
    if version and _numbers(version) < _OLDEST:
        said = f"{name} {version} is older than {_OLDEST[0]}.{_OLDEST[1]}"
        return Finding("CuPy", BROKEN, said, f"{_install(_extra_of(name))} --upgrade")
    return Finding("CuPy", OK, f"{name} {version}".rstrip())


def _driver() -> Finding:
    import cupy

    known, needed = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if not known:
        remedy = "install it, where there is an NVIDIA GPU; a container has to be started with it"
        return Finding("driver", MISSING, "there is no NVIDIA driver", remedy)
    name = f"{_driver_version()}, for CUDA up to {_dotted(known)}".lstrip(", ")
    if known // 1000 < needed // 1000:
        said = f"the driver ({name}) is too old for a CuPy of CUDA {_dotted(needed)}"
        other = f"pip uninstall -y {' '.join(_wheels())}; {_install(_extra_for_driver())}"
        return Finding("driver", BROKEN, said, f"update the driver, or {other}")
    return Finding("driver", OK, f"{name}; CuPy is of CUDA {_dotted(needed)}")


def _device() -> Finding:
    """Where there is none, what is wrong with the driver, if that is why."""
    import cupy

    runtime, hidden = cupy.cuda.runtime, os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        count = runtime.getDeviceCount()
        if count:
            return Finding("GPU", OK, f"{count}")
        said = "there is no GPU"
    except runtime.CUDARuntimeError as error:
        driver = _driver()
        if driver.state != OK:
            return driver
        said = f"there is no GPU ({_line(error)})"
    if hidden is not None:
        return Finding("GPU", BROKEN, said, f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it")
    return Finding("GPU", BROKEN, said, "nvidia-smi has to list one; a container has to be started with it")


def _headers() -> Finding:
    """As far as they are looked for: CuPy brings along what looks."""
    found: Any = "where CuPy finds them"
    with contextlib.suppress(ImportError, AttributeError):
        from cuda import pathfinder

        found = pathfinder.find_nvidia_header_directory("cudart")
    if not found:
        said = "CUDA's headers, with which kernels are compiled, are missing"
        return Finding("CUDA headers", BROKEN, said, _install(_extra_of(next(iter(_wheels()), ""))))
    return Finding("CUDA headers", OK, str(found))


# ---- on the GPU ------------------------------------------------------------------------------------------------------


def _gpu() -> Iterator[Finding]:
    """Ends with the first that nothing works without."""
    for look in (_cupy, _driver, _device, _headers):
        found = _tried("GPU", look, "")
        if found.what == "GPU" and found.state == OK:
            yield from _devices()
        else:
            yield found
        if found.state != OK:
            return
    wheel = next(iter(_wheels()), "")
    again = f"{_install(_extra_of(wheel))} --force-reinstall"
    yield _tried("kernels", _kernels, again)
    yield _tried("cuBLAS", _cublas, again)
    yield _tried("cuDNN", _cudnn, again)
    yield _tried("memory", _memory, again)
    yield _tried("NCCL", functools.partial(_nccl, wheel), again)
    yield _tried("kernel cache", _cache, "set CUPY_CACHE_DIR to a folder that can be written")


def _devices() -> Iterator[Finding]:
    import cupy

    for number in range(cupy.cuda.runtime.getDeviceCount()):
        yield _tried("GPU", functools.partial(_of_device, cupy, number), "nvidia-smi tells whether it works")


def _of_device(cupy: Any, number: int) -> Finding:
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    with cupy.cuda.Device(number):
        free, total = cupy.cuda.runtime.memGetInfo()
    capability = 10 * properties["major"] + properties["minor"]
    slow = "" if capability >= _BFLOAT16_FROM else ", whose tensor cores do not know bfloat16: --dtype float32"
    memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    said = f"{properties['name'].decode()}, {memory}, compute capability {capability / 10}{slow}"
    return Finding("GPU", OK, said)


def _kernels() -> Finding:
    """Compiles a kernel, past the cache, with the header that all of refpeft's have, and runs it."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    from refpeft.cuda.kernels import Source

    start = time.perf_counter()
    code = Source("common.cuh").text + 'extern "C" __global__ void twice(real* x) { *x = narrow(2 * wide(*x)); }'
    with _environment("CUPY_CACHE_IN_MEMORY", "1"):
        kernel = cupy.RawModule(code=code, options=("--std=c++17",)).get_function("twice")
    seconds = time.perf_counter() - start
    x = cupy.full(1, 21, "f4")
    kernel((1,), (1,), (x,))
    if float(x[0]) != 42:
        return Finding("kernels", BROKEN, f"one that doubles makes {float(x[0])} of 21")
    return Finding("kernels", OK, f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} compiles, here in {seconds:.1f} s")


def _cublas() -> Finding:
    import cupy

    from refpeft.backend import bfloat16
    from refpeft.cuda.blas import product

    x = cupy.full((16, 16), 2, "f4").astype(bfloat16)
    found = float(product(x, x).astype("f4")[3, 5])
    if found != 64:
        return Finding("cuBLAS", BROKEN, f"a product that is 64 came out as {found}")
    version = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
    return Finding("cuBLAS", OK, f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def _cudnn() -> Finding:
    from refpeft.cuda import cudnn

    absent = cudnn.missing()
    if absent is None:
        return Finding("cuDNN", OK, f"{cudnn.version()}, frontend {_version('nvidia-cudnn-frontend')}")
    said, _, remedy = absent.rpartition(": ")
    state = MISSING if _version("nvidia-cudnn-frontend") is None else BROKEN
    return Finding("cuDNN", state, f"{said}; attention is computed by refpeft's own kernel", remedy)


def _memory() -> Finding:
    from refpeft.cuda import stretch

    absent = stretch.missing()
    if absent is None:
        return Finding("memory", OK, "a run's arrays lie in stretches of addresses, which grow")
    return Finding("memory", MISSING, f"stretches of addresses ({absent}): runs take about a tenth more memory")


def _nccl(wheel: str) -> Finding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    if not nccl.available:
        package = f"nvidia-nccl-cu{wheel.removeprefix('cupy-cuda').removesuffix('x')}"
        return Finding("NCCL", MISSING, "NCCL, which joins several GPUs", f"pip install {package}")
    version = nccl.get_version()
    return Finding("NCCL", OK, f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def _cache() -> Finding:
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()  # as CuPy has it
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    kept = sum(1 for _ in folder.glob("*.cubin"))
    return Finding("kernel cache", OK, f"{folder}, {kept:,} kernels")


# ---- what the system tells -------------------------------------------------------------------------------------------


def _wheels() -> dict[str, str]:
    """The installed packages that are CuPy, with their versions: cupy-cuda13x, or cupy where it was built here."""
    names = (package.metadata["Name"] for package in importlib.metadata.distributions())
    return {name: _version(name) for name in sorted({str(n).lower() for n in names}) if _is_cupy(name)}


def _is_cupy(name: str) -> bool:
    return name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm"))


def _cuda_of_driver() -> int | None:
    """The newest CUDA that the driver knows, 13000 for 13.0; None where there is no driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value or None


def _driver_version() -> str:
    """Such as "driver 580.159.04", by the driver's own library; "" where it does not tell."""
    text = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if not library.nvmlInit_v2():
            library.nvmlSystemGetDriverVersion(text, len(text))
            library.nvmlShutdown()
    return text.value.decode()


def _extra_for_driver() -> str | None:
    """The extra of refpeft whose CuPy this machine's driver can run; None where the driver does not tell."""
    known = _cuda_of_driver()
    return f"cuda{min(13, known // 1000)}" if known and known >= 12000 else None


def _extra_of(wheel: str) -> str | None:
    return {"cupy-cuda12x": "cuda12", "cupy-cuda13x": "cuda13"}.get(wheel)


def _install(extra: str | None) -> str:
    """The line for pip; of either CUDA where it is not known which."""
    if extra:
        return f"pip install 'refpeft[{extra}]'"
    return "pip install 'refpeft[cuda13]' (or [cuda12], by the CUDA version that nvidia-smi shows)"


# ---- small helpers ---------------------------------------------------------------------------------------------------


def _tried(what: str, look: Callable[[], Finding], remedy: str) -> Finding:
    """What `look` finds, or that it failed, with what then helps."""
    try:
        return look()
    except Exception as error:  # whatever a broken library raises
        return Finding(what, BROKEN, _line(error), remedy)


def _line(error: Exception) -> str:
    """The last line of an error's text that says something: CuPy's texts are long, and end with the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-")]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _dotted(version: int) -> str:
    """CUDA's 13020 as 13.2"""
    return f"{version // 1000}.{version % 1000 // 10}"


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before, os.environ[name] = os.environ.get(name), value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
