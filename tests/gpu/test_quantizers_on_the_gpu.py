"""Every quantizer has the same codes and values on the GPU and on the host."""

import cupy
import numpy as np
import pytest
from variants import has_constants

from refpeft import manager
from refpeft.backend import to_host
from refpeft.quant import make_quantizer

NAMES = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "quantizer")
VARIANTS = [(name, {}) for name in NAMES] + [
    ("affine", {"bits": 8, "per": "row"}),
    ("affine", {"per": "tensor"}),
    ("affine", {"nested": True}),
    ("gguf", {"type": "Q4_0"}),
    ("gguf", {"type": "Q4_1"}),
]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 0.02, (300, 96)).astype("f4")
    outliers = np.where(rng.random(normal.shape) < 0.01, 300, 1).astype("f4")
    return {
        "normal": normal,
        "outliers": normal * outliers,
        "zeros": normal * (np.arange(300) % 3 > 0).astype("f4")[:, None] + np.float32(0),  # + 0 makes -0 to 0
        "nothing": np.zeros_like(normal),
        "few values, many ties": (rng.integers(-4, 5, (300, 96)) / 8).astype("f4"),
        "tiny": normal * np.float32(1e-28),
    }


@pytest.mark.parametrize(
    "name, options, double_quant",
    [(*v, False) for v in VARIANTS] + [(*v, True) for v in VARIANTS if has_constants(*v)],
    ids=str,
)
def test_a_quantizer_has_the_codes_and_values_of_the_host(name: str, options: dict, double_quant: bool):
    quantizer = make_quantizer(name, options, double_quant)
    for kind, weight in weights().items():
        here, there = (quantizer(xp.asarray(weight), np.dtype("f4")) for xp in (np, cupy))
        assert here.parts.keys() == there.parts.keys()
        for key, part in here.parts.items():
            assert isinstance(there.parts[key], cupy.ndarray) and there.parts[key].dtype == part.dtype
            differ = (to_host(there.parts[key]) != part).sum()
            assert differ <= 1e-5 * part.size, (kind, key, differ)
        again = quantizer.dense({key: cupy.asarray(part) for key, part in here.parts.items()}, weight.shape, "f4")
        assert np.array_equal(to_host(again), here()), kind
