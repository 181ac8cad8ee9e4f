"""What the scripts for quantizers share: cases of encoding with those of decoding, and double quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np
import torch
from common import Case, Compute, Tensors
from nf4 import NESTED_BLOCK, NESTED_BOUNDARIES, NESTED_MAP, encode_blocks, f32, safe

Parts = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], Parts]
Decode = Callable[[Parts, tuple[int, ...]], np.ndarray]


def encoding(encode: Encode) -> Compute:
    """The parts of the float32 weight."""
    return lambda t: {name: torch.tensor(part) for name, part in encode(t["weight"].numpy().astype(f32)).items()}


def decoding(decode: Decode, shape: tuple[int, ...]) -> Compute:
    """The float32 weight that the parts stand for."""

    def compute(t: Tensors) -> Tensors:
        arrays = {name: part.numpy() for name, part in t.items()}
        parts = {name: a.astype(f32) if a.dtype.kind == "f" else a for name, a in arrays.items()}
        return {"weight": torch.from_numpy(f32(decode(parts, shape)).reshape(shape))}

    return compute


def pair(
    name: str,
    variant: str,
    weight: np.ndarray,
    config: dict,
    encode: Encode,
    decode: Decode,
    *,
    maps: Parts | None = None,
    flags: str = "",
    comment: str = "",
    spec: str,
    agrees: dict[str, tuple[Encode | None, Decode | None]] | None = None,
) -> Iterator[Case]:
    """Encoding and decoding of one weight; `agrees` has witnesses of either."""
    weight, maps, agrees = np.asarray(weight, f32), maps or {}, agrees or {}
    parts, shape = encode(weight), weight.shape
    shared = {
        "kind": "quantizer",
        "name": name,
        "flags": tuple(flags.split()),
        "comment": comment,
        "spec": spec,
        "oracle": "scalar float32",
    }
    middle = "double-" if config.get("double_quant") else ""
    yield Case(
        id=f"{name}-{middle}encode-{variant}",
        at="encode",
        config=config,
        inputs={"weight": weight} | maps,
        compute=encoding(encode),
        limits=dict.fromkeys(parts, "exact"),
        witnesses={who: encoding(how) for who, (how, _) in agrees.items() if how},
        **shared,
    )
    yield Case(
        id=f"{name}-{middle}decode-{variant}",
        at="decode",
        config=config | {"shape": list(shape)},
        inputs=parts | maps,
        compute=decoding(decode, shape),
        limits={"weight": "exact"},
        witnesses={who: decoding(how, shape) for who, (_, how) in agrees.items() if how},
        **shared,
    )


# ---- double quantization ---------------------------------------------------------------------------------------------


def doubled(encode: Encode, decode: Decode, constant: str) -> tuple[Encode, Decode]:
    """The same with the float32 array `constant` among the parts in 8 bits, by golden/README.md's rules."""

    def encode_twice(weight: np.ndarray) -> Parts:
        parts = encode(weight)
        whole = parts.pop(constant)
        offset = f32(whole.astype(np.float64).mean())
        if not safe(whole - offset, NESTED_BOUNDARIES, NESTED_BLOCK):
            raise SystemExit("double quantization: a constant is too close to a boundary")
        codes, absmax = encode_blocks((whole - offset).reshape(-1), NESTED_BLOCK, NESTED_BOUNDARIES, zero=127)
        nested = {"nested_codes": np.uint8(codes).reshape(whole.shape), "nested_absmax": absmax}
        return parts | {"offset": np.array(offset)} | nested

    def decode_twice(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        codes, absmax = parts["nested_codes"], parts["nested_absmax"]
        whole = f32([NESTED_MAP[c] * absmax[i // NESTED_BLOCK] for i, c in enumerate(codes.reshape(-1))])
        return decode(parts | {constant: (whole + parts["offset"]).reshape(codes.shape)}, shape)

    return encode_twice, decode_twice


# ---- blocks and nibbles ----------------------------------------------------------------------------------------------


def rows_in_blocks(weight: np.ndarray, block: int) -> list[list[np.ndarray]]:
    """The rows of the last axis, each cut into blocks; the last block of a row may be short."""
    rows = weight.reshape(prod(weight.shape[:-1]), -1)
    return [[row[at : at + block] for at in range(0, len(row), block)] for row in rows]


def far_from_halves(steps: np.ndarray) -> None:
    """Raises SystemExit where rounding float64 `steps` to integers hangs on last bits of float32."""
    if (np.abs(np.abs(steps) % 1 - 0.5) < 1e-5).any():
        raise SystemExit("a weight is too close to the middle of two steps")


def pack_high_first(codes: list[int], unused: int) -> np.ndarray:
    codes = codes + [unused] * (len(codes) % 2)
    return np.uint8([codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)])


def unpack_high_first(packed: np.ndarray, count: int) -> list[int]:
    return [int(half) for byte in packed for half in (byte >> 4, byte & 15)][:count]
