"""A quantized weight as the tensors of a safetensors file, as transformers with bitsandbytes writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
from bitsandbytes import functional as bnb
from bitsandbytes_rules import FP4
from codebooks import FP4_BOUNDARIES, FP4_SORTED, four_bits, int8_encode
from common import Case, Compute, Draw, Tensors
from nf4 import CODEBOOK, NESTED_BLOCK, NESTED_MAP, VERSION, encode
from quantizing import Parts


def four_bit_file(kind: str, shape: list[int], nested: bool) -> Compute:
    def compute(t: Tensors) -> Tensors:
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": shape}
        tensors = {"weight": t["packed"][:, None], "weight.quant_map": t["codebook"].float()}
        if nested:
            tensors |= {
                "weight.absmax": t["nested_codes"],
                "weight.nested_absmax": t["nested_absmax"].float(),
                "weight.nested_quant_map": t["nested_map"].float(),
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(t["offset"])}
        else:
            tensors["weight.absmax"] = t["absmax"].float()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode())).byte()
        return {f"q_proj.{name}": tensor for name, tensor in tensors.items()}

    return compute


def bnb_file(kind: str, shape: list[int], nested: bool) -> Compute:
    def compute(t: Tensors) -> Tensors:
        inner = bnb.QuantState(
            absmax=t["nested_absmax"].float() if nested else None,
            blocksize=NESTED_BLOCK,
            code=t["nested_map"].float() if nested else None,
            dtype=torch.float32,
        )
        state = bnb.QuantState(
            absmax=t["nested_codes"] if nested else t["absmax"].float(),
            shape=torch.Size(shape),
            code=t["codebook"].float(),
            blocksize=64,
            quant_type=kind,
            dtype=torch.bfloat16,
            offset=t["offset"].float() if nested else None,
            state2=inner if nested else None,
        )
        tensors = {f"q_proj.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"q_proj.weight": t["packed"][:, None]} | tensors

    return compute


def int8_file(t: Tensors) -> Tensors:
    weight_format = torch.zeros((), dtype=torch.uint8)
    return {"q_proj.weight": t["codes"], "q_proj.SCB": t["scale"].float(), "q_proj.weight_format": weight_format}


def cases() -> Iterator[Case]:
    draw = Draw("files-cases")
    shape = [6, 32]
    weight = draw.normal(*shape, scale=0.02)
    fp4, _ = four_bits(FP4, FP4_BOUNDARIES, FP4_SORTED, zero=7, block=64)
    flat = {name: part.numpy() for name, part in encode({"weight": torch.from_numpy(weight)}, double=False).items()}
    double = {name: part.numpy() for name, part in encode({"weight": torch.from_numpy(weight)}, double=True).items()}
    yield four_bit_case("nf4", "nf4-file-plain", shape, flat | {"codebook": CODEBOOK})
    maps = {"codebook": CODEBOOK, "nested_map": NESTED_MAP}
    yield four_bit_case("nf4", "nf4-double-file-plain", shape, double | maps)
    yield four_bit_case("fp4", "fp4-file-plain", shape, fp4(weight) | {"codebook": FP4})
    parts = int8_encode(weight)
    yield file_case("int8", "int8-file-plain", {"shape": shape}, parts, int8_file, "SCB is the scale; weight_format 0")


def four_bit_case(kind: str, case_id: str, shape: list[int], parts: Parts) -> Case:
    nested = "offset" in parts
    config = {"block": 64, "double_quant": nested} | ({"nested_block": NESTED_BLOCK} if nested else {})
    config |= {"shape": shape, "dtype": "bfloat16"}
    case = file_case(
        kind, case_id, config, parts, four_bit_file(kind, shape, nested), "quant_state is JSON in UTF-8, byte by byte"
    )
    case.witnesses = {VERSION: bnb_file(kind, shape, nested)}
    return case


def file_case(kind: str, case_id: str, config: dict, parts: Parts, compute: Compute, comment: str) -> Case:
    tensors = {name: torch.from_numpy(np.asarray(part)) for name, part in parts.items()}
    return Case(
        id=case_id,
        kind="quantizer",
        name=kind,
        at="file",
        level="interop",
        flags=("QuantState",),
        comment=comment,
        spec="golden/README.md, Files",
        config=config,
        inputs=parts,
        compute=compute,
        oracle="by the format",
        limits=dict.fromkeys(compute(tensors), "exact"),
    )
