"""The random stream, in scalar Python: Philox 4x32-10 (Salmon et al., 2011) and how refpeft counts with it.

The first cases are the known answers that the authors' Random123 library ships (kat_vectors).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from common import Case

MASK = 0xFFFFFFFF

KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four words of 32 bits from a counter of four and a key of two."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k0, right & MASK, (left >> 32) ^ c[3] ^ k1, left & MASK]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c


def words(seed: int, purpose: list[str | int], count: int) -> list[int]:
    """The first `count` words of a stream: blocks of four, numbered from 0; the purpose is hashed into the counter."""
    text = "\0".join(str(part) for part in purpose).encode()
    out: list[int] = []
    block = 0
    while len(out) < count:
        counter = [block & MASK, block >> 32, zlib.crc32(text), zlib.adler32(text)]
        out += philox(counter, [seed & MASK, seed >> 32 & MASK])
        block += 1
    return out[:count]


def unit(seed: int, purpose: list[str | int], count: int) -> list[float]:
    """Floats of [0, 1) with 53 bits: two words each, the first is the high one."""
    w = words(seed, purpose, 2 * count)
    return [((w[2 * i] << 32 | w[2 * i + 1]) >> 11) * 2.0**-53 for i in range(count)]


def normal(seed: int, purpose: list[str | int], count: int) -> list[float]:
    """Box and Muller: value i from units i and count + i."""
    u = unit(seed, purpose, 2 * count)
    return [math.sqrt(-2 * math.log1p(-u[i])) * math.cos(2 * math.pi * u[count + i]) for i in range(count)]


def permutation(seed: int, purpose: list[str | int], count: int) -> list[int]:
    """The numbers 0 .. count - 1, sorted by 64-bit words."""
    w = words(seed, purpose, 2 * count)
    return sorted(range(count), key=lambda i: w[2 * i] << 32 | w[2 * i + 1])


def cases() -> Iterator[Case]:
    for variant, (counter, key, answer) in KNOWN_ANSWERS.items():
        if philox(counter, key) != answer:
            raise SystemExit(f"philox-{variant}: the scalar code does not give Random123's known answer")
        yield Case(
            id=f"philox-{variant}",
            kind="random",
            name="philox4x32",
            flags=("PhiloxRounds",),
            comment="a known answer of the authors' library",
            spec="doi:10.1145/2063384.2063405; Random123 kat_vectors",
            inputs={"counter": np.int64(counter), "key": np.int64(key)},
            oracle="scalar Python",
            compute=lambda t: {"words": torch.tensor(philox(t["counter"].tolist(), t["key"].tolist()))},
        )
    for variant, seed, purpose in (
        ("plain", 0, ["data"]),
        ("names", 17, ["init", "lora", "model.layers.0.self_attn.q_proj"]),
        ("long-seed", 2**33 + 5, ["dropout", 3, "é"]),
    ):

        def compute(_, seed=seed, purpose=purpose):
            return {
                "bits": torch.tensor(words(seed, purpose, 10)),
                "uniform": torch.tensor(unit(seed, purpose, 6), dtype=torch.float64),
                "normal": torch.tensor(normal(seed, purpose, 7), dtype=torch.float64),
                "permutation": torch.tensor(permutation(seed, purpose, 9)),
            }

        yield Case(
            id=f"stream-{variant}",
            kind="random",
            name="stream",
            flags=("StreamPurpose", "StreamWordOrder"),
            comment="each output is of a fresh stream of this seed and purpose",
            spec="golden/README.md, Random numbers",
            config={"seed": seed, "purpose": purpose},
            inputs={},
            compute=compute,
            oracle="scalar Python",
        )
