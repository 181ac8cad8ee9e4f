"""Elements a second of quantizing and dequantizing 4 bits: refpeft and bitsandbytes, in turns, on one CPU or GPU.

    python tests/bench/quantize.py [--rows 2048] [--columns 2048] [--quantizer nf4] [--threads 1 2] [--repeats 31]
    python tests/bench/quantize.py --device cuda --rows 16384 --columns 16384 [--double-quant]

Each number of threads runs in a process of its own; one thread is measured in its own time, more on the clock. Medians
for float32 weights in blocks of 64, and how many times faster refpeft is. bitsandbytes has a kernel for AVX-512, which
takes rows that are multiples of 16: where the CPU has AVX-512, --columns 2056 measures its C++ for other CPUs. Needs
the extra `oracle` for the peer.

On a GPU weights come from float32 and become bfloat16, medians are between events of CUDA, and what refpeft's kernels
read and write is said in GB/s. There the peer may be missing.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time

import numpy as np

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin for work would take the processor from those of the other side
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # memory is used again: fresh pages can cost more than what is measured
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}

CALLS = 10  # on a GPU, between two events: of large weights, so that the host is ahead of it


def measure(rows: int, columns: int, name: str, threads: int, repeats: int) -> None:
    import torch
    from bitsandbytes import functional as bnb

    from refpeft import blockwise_numpy
    from refpeft.quant import make_quantizer

    blockwise_numpy.THREADS = threads
    torch.set_num_threads(threads)
    weight = np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype("f4")
    tensor, quantizer = torch.from_numpy(weight), make_quantizer(name)
    packed, state = bnb.quantize_4bit(tensor, quant_type=name, blocksize=64)
    kept = quantizer(weight, np.dtype("f4"))
    work = {
        "quantize": {
            "refpeft": lambda: quantizer.pack(weight),
            "bitsandbytes": lambda: bnb.quantize_4bit(tensor, quant_type=name, blocksize=64),
        },
        "dequantize": {"refpeft": kept, "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)},
    }
    clock = (
        time.thread_time if threads == 1 else time.perf_counter
    )  # other work on the machine does not count, if it can
    for what, sides in work.items():
        seconds = {side: [] for side in sides}
        for _ in range(repeats):  # in turns, so that other work on the machine slows down both
            for side, function in sides.items():
                started = clock()
                function()
                seconds[side].append(clock() - started)
        ours, theirs = (weight.size / np.median(values) / 1e6 for values in seconds.values())
        print(
            f"{threads} threads  {what:10}  refpeft {ours:7.0f}  bitsandbytes {theirs:7.0f}  M/s  {ours / theirs:6.2f}x"
        )


def measure_on_a_gpu(rows: int, columns: int, name: str, double_quant: bool, repeats: int) -> None:
    import cupy

    from refpeft.backend import bfloat16, module
    from refpeft.quant import make_quantizer

    array = np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype("f4")
    weight, quantizer = module("cuda").asarray(array), make_quantizer(name, double_quant=double_quant)
    kept = quantizer(weight, bfloat16)
    work = {"quantize": {"refpeft": lambda: quantizer.pack(weight)}, "dequantize": {"refpeft": kept}}
    with contextlib.suppress(ImportError, AssertionError):  # torch asserts that it can use a GPU
        import torch
        from bitsandbytes import functional as bnb

        tensor, how = torch.from_numpy(array).cuda(), {"compress_statistics": double_quant, "quant_type": name}
        packed, state = bnb.quantize_4bit(tensor, **how)
        state.dtype = torch.bfloat16
        work["quantize"]["bitsandbytes"] = lambda: bnb.quantize_4bit(tensor, **how)
        work["dequantize"]["bitsandbytes"] = lambda: bnb.dequantize_4bit(packed, state)
    bytes_of = {"quantize": weight.nbytes + kept.nbytes, "dequantize": kept.nbytes + 2 * weight.size}
    for what, sides in work.items():
        times = {side: [] for side in sides}
        for _ in range(repeats + 3):
            for side, function in sides.items():
                started, ended = cupy.cuda.Event(), cupy.cuda.Event()
                started.record()
                for _ in range(CALLS):
                    function()
                ended.record()
                ended.synchronize()
                times[side].append(cupy.cuda.get_elapsed_time(started, ended) / 1e3 / CALLS)
        for side, seconds in times.items():
            median = float(np.median(seconds[3:]))
            speed = f"{weight.size / median / 1e6:9.0f} M/s  {bytes_of[what] / median / 1e9:6.0f} GB/s"
            print(f"{what:10}  {side:12}  {median * 1e6:8.1f} us  {speed}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--rows", type=int, default=2048)
    arguments.add_argument("--columns", type=int, default=2048)
    arguments.add_argument("--quantizer", choices=["nf4", "fp4"], default="nf4")
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--repeats", type=int, default=31)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--double-quant", action="store_true", help="on a GPU: constants in 8 bits")
    arguments.add_argument("--here", action="store_true", help="measure in this process")
    given = arguments.parse_args()
    if given.device == "cuda":
        return measure_on_a_gpu(given.rows, given.columns, given.quantizer, given.double_quant, given.repeats)
    if given.here:
        return measure(given.rows, given.columns, given.quantizer, given.threads[0], given.repeats)
    for threads in map(str, given.threads):
        command = [sys.executable, *sys.argv, "--here", "--threads", threads]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": threads})


if __name__ == "__main__":
    main()
