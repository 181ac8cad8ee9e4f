"""bitsandbytes 0.50 on a CPU under test: its 4-bit, 8-bit and int8 formats, its files, and its optimizers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from bitsandbytes import optim
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch_parts import Tensors, arrays, has_avx512, path

from refpeft.conformance.vectors import Arrays, Case


class Bitsandbytes:
    """What its public functions, layers and optimizers give. It keeps constants and states in float32 alone."""

    name = "bitsandbytes"
    version = bitsandbytes.__version__
    dtypes = ("float32",)

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind not in ("quantizer", "optimizer"):
            raise NotImplementedError("bitsandbytes has quantizers and optimizers alone")
        answer = steps if case.name in OPTIMIZERS else QUANTIZERS.get((case.name, case.at))
        if answer is None:
            raise NotImplementedError("not in bitsandbytes")
        if case.config.get("compat") == "bnb-cuda":
            raise NotImplementedError("what it does on CUDA, and this is a CPU")
        t = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
        with plainly():
            return arrays(answer(case, t))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Compiling its fallbacks for every shape would take most of the time; a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def encode_4bit(case: Case, t: Tensors) -> Tensors:
    config = case.config
    packed, state = bnb.quantize_4bit(
        t["weight"],
        blocksize=config["block"],
        compress_statistics=config["double_quant"],
        quant_type=case.name,
    )
    if not config["double_quant"]:
        return {"packed": packed[:, 0], "absmax": state.absmax}
    nested = {"nested_codes": state.absmax, "nested_absmax": state.state2.absmax}
    return {"packed": packed[:, 0], "offset": state.offset, **nested}


def decode_4bit(case: Case, t: Tensors) -> Tensors:
    if case.config["shape"][-1] % case.config["block"] and not has_avx512():
        raise NotImplementedError("what its kernel for AVX-512 does, and this processor has none")
    return {"weight": bnb.dequantize_4bit(t["packed"][:, None], state_of(case, t)).float()}


def file_4bit(case: Case, t: Tensors) -> Tensors:
    return layer_4bit(case, t).state_dict(prefix="q_proj.")


def layer_4bit(case: Case, t: Tensors) -> Linear4bit:
    outputs, inputs = case.config["shape"]
    layer = Linear4bit(inputs, outputs, bias=False, quant_type=case.name)
    layer.weight = Params4bit(t["packed"][:, None], False, state_of(case, t), quant_type=case.name, bnb_quantized=True)
    return layer


def linear_4bit(case: Case, t: Tensors) -> Tensors:
    layer, x = layer_4bit(case, t), t["x"]
    if "g" in t:
        y = layer(x.requires_grad_())
        y.backward(t["g"])
        return {"y": y, "grad.x": x.grad}
    if not bnb.has_avx512bf16():
        raise NotImplementedError("what its kernel for AVX-512 BF16 does, and this processor has none")
    with torch.no_grad():
        y = layer.eval()(x)
    file = layer.state_dict()
    loaded = Params4bit.from_prequantized(file.pop("weight"), file, device="cpu")
    return {"y": y, "weight": bnb.dequantize_4bit(loaded, loaded.quant_state).float()}


def state_of(case: Case, t: Tensors) -> bnb.QuantState:
    """What belongs to the packed codes."""
    config, nested = case.config, None
    if config["double_quant"]:
        nested = bnb.QuantState(t["nested_absmax"], None, t["nested_map"], config["nested_block"], dtype=torch.float32)
    return bnb.QuantState(
        absmax=t["nested_codes"] if nested else t["absmax"],
        shape=torch.Size(config["shape"]),
        code=t["codebook"],
        blocksize=config["block"],
        quant_type=case.name,
        dtype=getattr(torch, config.get("dtype", "float32")),
        offset=t["offset"] if nested else None,
        state2=nested,
    )


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def encode_dynamic(case: Case, t: Tensors) -> Tensors:
    without_offset(case)
    codes, state = bnb.quantize_blockwise(t["weight"], t["map"], blocksize=case.config["block"])
    return {"codes": codes, "absmax": state.absmax}


def decode_dynamic(case: Case, t: Tensors) -> Tensors:
    without_offset(case)
    block = case.config["block"]
    return {"weight": bnb.dequantize_blockwise(t["codes"], absmax=t["absmax"], code=t["map"], blocksize=block)}


def without_offset(case: Case) -> None:
    if case.config.get("offset"):
        raise NotImplementedError("it takes a mean off constants alone")


def encode_int8(case: Case, t: Tensors) -> Tensors:
    not_nested(case)
    codes, scale, _ = bnb.int8_vectorwise_quant(t["weight"].half())  # it takes float16 alone, and so do its layers
    return {"codes": codes, "scale": scale}


def decode_int8(case: Case, t: Tensors) -> Tensors:
    not_nested(case)
    return {"weight": bnb.int8_vectorwise_dequant(t["codes"], t["scale"])}


def not_nested(case: Case) -> None:
    if case.config.get("double_quant"):
        raise NotImplementedError("it has double quantization of 4-bit formats alone")


def file_int8(case: Case, t: Tensors) -> Tensors:
    outputs, inputs = case.config["shape"]
    layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(t["codes"], requires_grad=False, CB=t["codes"], SCB=t["scale"])
    return layer.state_dict(prefix="q_proj.")


def linear_int8(case: Case, t: Tensors) -> Tensors:
    """The product in float32: in float16, as its layers have it, rounding would hide the rest."""
    product = torch.ops.bitsandbytes.int8_scaled_mm
    return {"y": product(t["x_codes"], t["codes"], t["x_scale"], t["scale"], dtype=torch.float32)}


QUANTIZERS: dict[tuple[str, str | None], Callable[[Case, Tensors], Tensors]] = {
    ("dynamic8", "encode"): encode_dynamic,
    ("dynamic8", "decode"): decode_dynamic,
    ("int8", "encode"): encode_int8,
    ("int8", "decode"): decode_int8,
    ("int8", "file"): file_int8,
    ("int8", "linear"): linear_int8,
    **{(name, "encode"): encode_4bit for name in ("nf4", "fp4")},
    **{(name, "decode"): decode_4bit for name in ("nf4", "fp4")},
    **{(name, "file"): file_4bit for name in ("nf4", "fp4")},
    **{(name, "linear"): linear_4bit for name in ("nf4", "fp4")},
}

# ---- optimizers ------------------------------------------------------------------------------------------------------


def steps(case: Case, t: Tensors) -> Tensors:
    return path(t, case.config, lambda params: OPTIMIZERS[case.name](params, case.config))


Params = list[torch.Tensor]


def adam(params: Params, config: dict) -> optim.Adam:
    return optim.Adam(params, betas=config["betas"], eps=config["eps"])


def adamw(params: Params, config: dict) -> optim.AdamW:
    return optim.AdamW(params, betas=config["betas"], eps=config["eps"], weight_decay=config["weight_decay"])


def adamw8bit(params: Params, config: dict) -> optim.AdamW8bit:
    """Also for small parameters, which it keeps in 32 bits unless it is told otherwise."""
    options = {name: config[name] for name in ("betas", "eps", "weight_decay")}
    return optim.AdamW8bit(params, min_8bit_size=0, **options)


def sgd(params: Params, config: dict) -> optim.SGD:
    return optim.SGD(params, lr=1.0, momentum=config["momentum"], weight_decay=config["weight_decay"])


def lion(params: Params, config: dict) -> optim.Lion:
    return optim.Lion(params, betas=config["betas"], weight_decay=config["weight_decay"])


OPTIMIZERS = {"adam": adam, "adamw": adamw, "adamw8bit": adamw8bit, "sgd": sgd, "lion": lion}
