"""cuDNN has a kernel for every attention that is left to it, on an H200: its planner says so without a GPU.

It runs in a process of its own, where a library of empty functions stands for the driver's.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

DEVICE = {
    "deviceName": "NVIDIA H200", "cudaDeviceId": 0, "deviceVer": 900, "multiProcessorCount": 132, "driverVer": 13000,
    "maxSharedMemoryPerBlockOptin": 232448, "maxSharedMemoryPerBlock": 49152, "reservedSharedMemoryPerBlock": 1024,
    "totalGlobalMem": 150754820096, "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
    "memoryBusWidth": 6144, "l2CacheSize": 62914560, "warpSize": 32, "pciDeviceId": 9013, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1,
    "oversizedSharedMemoryPerBlock": 0,
}  # fmt: skip

DRIVER = """
cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuDeviceGet cuDeviceGetCount cuDriverGetVersion
cuGetErrorName cuGetErrorString cuInit cuKernelGetAttribute cuKernelGetFunction cuKernelSetAttribute
cuLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx cuLibraryGetKernel cuLibraryLoadData cuLibraryLoadFromFile
cuLibraryUnload cuLinkAddData cuLinkComplete cuLinkCreate cuLinkDestroy cuModuleGetFunction cuModuleLoadData
cuModuleUnload cuOccupancyMaxPotentialClusterSize cuStreamGetCtx cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
"""
"""What cuDNN looks for in libcuda when it plans."""

MASKS = {
    "causal": {},
    "causal behind a prefix": {"extra": 10},
    "causal behind a cache": {"before": 100},
    "window": {"window": 33},
    "window behind a cache": {"window": 33, "before": 100},
    "all": {"causal": False},
    "padded": {"causal": False, "padded": True},
    "padded behind a prefix": {"causal": False, "padded": True, "extra": 10},
    "padded and causal": {"padded": True},
}
HEADS = {
    "Llama 1B": (4, 32, 8, 2048, 64),
    "Llama 8B": (1, 32, 8, 8192, 128),
    "SmolLM": (8, 9, 3, 512, 64),
    "MiniLM": (64, 12, 12, 128, 32),
    "odd": (3, 6, 2, 101, 80),
    "widest": (2, 4, 1, 77, 256),
    "narrowest": (2, 4, 4, 2, 8),
}
WHICH = "forward", "backward", "backward of a part"


def check(device: dict) -> dict[str, str | None]:
    """Why cuDNN has no plan for an attention, or None, by name."""
    import cudnn
    import numpy as np

    from refpeft.cuda import cudnn as ours
    from refpeft.fused import Mask

    options = {"device_property": cudnn.create_device_properties(json.dumps(device)), "sm_version": 90, "sm_count": 132}
    found = {}
    for heads, (batch, of_queries, of_keys, queries, dim) in HEADS.items():
        for name, given in MASKS.items():
            tokens = queries + given.get("before", 0)
            segments = np.zeros((1, 1), "i4") if given.get("padded") else None
            mask = Mask(
                tokens, given.get("window"), segments, given.get("causal", True), None, given.get("padded", False)
            )
            q = _array(batch, of_queries, queries, dim)
            k = v = _array(batch, of_keys, tokens + given.get("extra", 0), dim)
            for which in WHICH:
                task = ours.task_of(q, k, v, mask, dim**-0.5, which != "forward")
                said = task if isinstance(task, str) else None
                if said is None and which == "backward of a part":
                    task = replace(task, batch=1, heads=of_queries // of_keys, kv_heads=1)
                if said is None:
                    try:
                        ours.described(task, **options)
                    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
                        said = str(error)
                found[f"{heads}, {name}, {which}"] = said
    return found


def _array(batch: int, heads: int, time: int, dim: int) -> SimpleNamespace:
    """What is read of a bfloat16 array (batch, heads, time, dim) that is a view of (batch, time, heads, dim)."""
    strides = tuple(2 * n for n in (time * heads * dim, dim, heads * dim, 1))
    size = batch * heads * time * dim
    return SimpleNamespace(
        shape=(batch, heads, time, dim), strides=strides, itemsize=2, size=size, data=SimpleNamespace(ptr=0)
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str | None]:
    pytest.importorskip("cupy")
    pytest.importorskip("cudnn")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler, for what stands for the driver")
    folder = tmp_path_factory.mktemp("driver")
    functions = "".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER.split())
    (folder / "driver.c").write_text(functions)
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "driver.c"], check=True)
    done = subprocess.run([sys.executable, __file__, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", WHICH)
def test_cudnn_has_a_plan_for_every_attention_that_is_left_to_it(said, heads: str, mask: str, which: str):
    assert said[f"{heads}, {mask}, {which}"] is None


if __name__ == "__main__":
    import ctypes

    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
    print(json.dumps(check(DEVICE)))
