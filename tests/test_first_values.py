"""First values are drawn as docstrings say: deviations of normal numbers, bounds of uniform ones, constants."""

import numpy as np
import pytest
import sources
import tiny

from refpeft import sites

DIM = 24

NORMAL = [  # method, options, name of the value, deviation
    ("adalora", {}, "P", 0.02),
    ("adalora", {}, "Q", 0.02),
    ("adamix", {}, "down", 0.02),
    ("adamix", {}, "up", 0.02),
    ("attention_fusion", {}, "query", 0.0),
    ("ipt", {"d": 200}, "z", 0.02),
    ("llama_adapter", {}, "prompt", 1.0),
    ("llama_adapter", {}, "gate", 0.0),
    ("ladder_side", {"r": 3}, "alpha", 0.0),
    ("lora", {"r": 4, "init": "gaussian"}, "A", 0.25),
    ("lora", {"targets": ["@embed"]}, "A", 0.0),
    ("lora", {"targets": ["@embed"]}, "B", 1.0),
    ("multitask_prompt", {}, "prompt", 1.0),
    ("multitask_prompt", {"tasks": 2, "ranks": 8}, "cols0", 0.02),
    ("multitask_prompt", {"tasks": 2, "ranks": 8}, "rows1", 0.02),
    ("p_tuning", {"encoder": "mlp"}, "rows", 1.0),
    ("p_tuning_v2", {}, "keys", 0.02),
    ("p_tuning_v2", {"hidden": 64}, "inner", 0.02),
    ("p_tuning_v2", {"hidden": 64}, "inner_bias", 0.0),
    ("pre_embed", {}, "prompt", 0.02),
    ("pre_layer", {"tokens": 20}, "rows", 0.02),
    ("prefix_tuning", {"init_std": 0.5}, "keys", 0.5),
    ("prefix_tuning", {"init_std": 0.5}, "values", 0.5),
    ("prefix_tuning", {"hidden": 8, "init_std": 0.5}, "rows", 0.5),
    ("prompt_tuning", {"init": "random"}, "prompt", 1.0),
    ("sparse_adapter", {"prune": "threshold"}, "down", 0.02),
    ("unipelt", {}, "up", 0.02),
    ("unipelt", {}, "B", 0.0),
]

UNIFORM = [  # method, options, name of the value, the width whose root bounds it
    ("compacter", {"size": 8, "n": 4}, "down_t", (1 + DIM / 4) / 12),  # Glorot's, with gain sqrt(2)
    ("eva", {"r": 8}, "A", DIM),
    ("ipt", {"hidden": 64}, "outer", 64),
    ("ipt", {"d": 50}, "inner", 50),
    ("ladder_side", {"r": 3}, "ladder", DIM),
    ("ladder_side", {"r": 3}, "last", DIM // 3),
    ("lora", {}, "A", DIM),
    ("p_tuning", {}, "weight_hh_l1", DIM // 2),  # by default as wide as dim in both directions together
    ("p_tuning", {"encoder": "mlp", "hidden": 48}, "mlp1", 48),
    ("prefix_tuning", {"hidden": 50}, "outer", 50),
    ("unipelt", {"r": 8}, "A", DIM),
    ("unipelt", {"hidden": 50}, "outer", 50),
]


def first_values(method: str, options: dict, name: str) -> np.ndarray:
    adapter = sites.attach(tiny.model(), method, options)
    found = [t.data.ravel() for key, t in (adapter.params | adapter.constants).items() if key.endswith(f".{name}")]
    return np.concatenate(found)


@pytest.mark.parametrize(("method", "options", "name", "deviation"), NORMAL)
def test_normal_values_have_the_deviation_that_is_said(method, options, name, deviation):
    found = first_values(method, options, name)
    assert found.std() == pytest.approx(deviation, rel=4 / found.size**0.5)
    assert abs(found.mean()) <= 5 * deviation / found.size**0.5


@pytest.mark.parametrize(("method", "options", "name", "width"), UNIFORM)
def test_uniform_values_fill_the_bounds_that_are_said(method, options, name, width):
    found = first_values(method, options, name)
    assert found.size > 50 and 0.9 * width**-0.5 < abs(found).max() <= width**-0.5


def test_scales_of_said_start_from_one():
    assert (first_values("intrinsic_said", {"d": 100}, "weight_scale") == 1).all()


def test_a_fusion_starts_from_all_but_the_identity():
    adapter = sites.attach(tiny.model(), "adapterfusion", {"size": 5, "adapters": sources.bottlenecks(2)})
    for name, tensor in adapter.params.items():
        if name.endswith("value"):
            assert np.array_equal(tensor.data, np.where(np.eye(DIM), 1, 1e-6))
        elif name.endswith("bias"):
            assert not tensor.data.any()
        else:
            assert tensor.data.std() == pytest.approx(0.02, rel=0.2), name
