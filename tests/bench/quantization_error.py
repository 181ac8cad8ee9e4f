"""What every shipped quantizer loses, as relative RMSE: |dequantized - weight| / |weight|, beside its bits a weight.

    python tests/bench/quantization_error.py [MODEL ...]

For a million normal, Student-t (5 degrees of freedom) and uniform numbers in rows of 1,024, and for the linear weights
of the first, the middle and the last layer of each MODEL (the embedded one if none is given). Prints a Markdown table.
Quantizers with float32 constants have a second row, with double quantization. The weights of a GGUF model are multiples
of its own steps, which flatters the same format (Q4_1 on Q4_1 is 0). "-": its rows do not fit the format.
"""

import sys

import numpy as np

from refpeft import manager
from refpeft.backend import cast
from refpeft.errors import RefpeftError
from refpeft.models.checkpoint import linear_weights, open_checkpoint
from refpeft.models.hub import resolve
from refpeft.quant import Quantizer, make_quantizer

VARIANTS = {
    "affine": [{}, {"bits": 8}],
    "gguf": [{"type": "Q4_0"}, {"type": "Q4_1"}, {"type": "Q8_0"}],
}
"""Options of the rows of a quantizer that has more than one."""

F4 = np.dtype("f4")


def quantizers() -> dict[str, Quantizer]:
    """Every shipped quantizer by a label, in the order of the catalogue."""
    found = {}
    for name, listing in manager.catalogue().items():
        for options in VARIANTS.get(name, [{}]) if listing.kind == "quantizer" else ():
            label = " ".join([name, *map(str, options.values())])
            found[label] = make_quantizer(name, options)
            if any(part.dtype == F4 and part.ndim for part in found[label].pack(np.ones((1, 64), F4)).values()):
                found[f"{label} + double"] = make_quantizer(name, options, double_quant=True)
    return found


def made_up() -> dict[str, list[np.ndarray]]:
    rng, shape = np.random.default_rng(0), (1024, 1024)
    drawn = {
        "normal": rng.normal(size=shape),
        "Student-t5": rng.standard_t(5, shape),
        "uniform": rng.uniform(-1, 1, shape),
    }
    return {name: [values.astype(F4)] for name, values in drawn.items()}


def of_model(name: str) -> list[np.ndarray]:
    """The linear weights of three layers, (out, in)."""
    checkpoint = open_checkpoint(resolve(name))
    layers = {0, checkpoint.config.layers // 2, checkpoint.config.layers - 1}
    wanted = [key for key in linear_weights(checkpoint.config) if any(f".{layer}." in key for layer in layers)]
    transposed = checkpoint.config.family == "gpt2"
    arrays = [cast(checkpoint.tensor(key), F4) for key in wanted]
    return [np.ascontiguousarray(array.T if transposed else array) for array in arrays]


def error(quantizer: Quantizer, weights: list[np.ndarray]) -> str:
    """The relative RMSE over all weights, "-" where their shapes do not fit."""
    try:
        lost = sum(float(((quantizer(weight, F4)() - weight).astype("f8") ** 2).sum()) for weight in weights)
    except RefpeftError:
        return "-"
    return f"{(lost / sum(float((weight.astype('f8') ** 2).sum()) for weight in weights)) ** 0.5:.4f}"


def main(models: list[str]) -> None:
    weights = made_up() | {model.rpartition("/")[2]: of_model(model) for model in models}
    print("| quantizer | bits | " + " | ".join(weights) + " |")
    print("| --- " * (len(weights) + 2) + "|")
    (normal,) = weights["normal"]
    for label, quantizer in quantizers().items():
        bits = quantizer(normal, F4).nbytes * 8 / normal.size
        errors = " | ".join(error(quantizer, arrays) for arrays in weights.values())
        print(f"| {label} | {bits:.3f} | {errors} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["embedded"])
