"""LoRA+ and LoRA-FA: learning rates of their own, and what a frozen A saves."""

import numpy as np
import pytest
import tiny
from test_memory import BATCH, SIZE, TIME, frozen, kept
from test_trainer import trainer

from refpeft import learning, sites
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.optim import SGD, Flat
from refpeft.tensor import parameter


def test_with_loraplus_B_moves_so_many_times_as_far():
    moved = {}
    for ratio in (1.0, 16.0):
        model = tiny.model()
        adapter = sites.attach(model, "lora", {"lr_ratio": ratio, "targets": ["@q", "@embed"]})
        tiny.scramble(adapter)
        before = {name: tensor.data.copy() for name, tensor in adapter.params.items()}
        flat = Flat(model.trained(), learning.rates(model))
        optimizer = SGD(flat)
        model.loss(tiny.batch()).backward()
        optimizer.step(0.1)
        moved[ratio] = {name: tensor.data - before[name] for name, tensor in adapter.params.items()}
    assert len(moved[1.0]) == 6
    for name, distance in moved[1.0].items():
        factor = 16 if name.endswith(".B") else 1
        assert np.allclose(moved[16.0][name], factor * distance, rtol=1e-9, atol=1e-15), name


def test_the_trainer_takes_the_rates_of_the_method():
    built = trainer(Train(steps=1, optimizer="sgd"), lr_ratio=4.0)
    assert dict(zip(built.flat.params, built.flat.rates, strict=True)) == {
        name: 4.0 if name.endswith(".B") else 1.0 for name in built.flat.params
    }


def test_a_rate_that_is_not_above_zero_is_an_error():
    with pytest.raises(RefpeftError, match=r"lora: B learns 0\.0 times as fast: expected more than 0"):
        trainer(Train(steps=1), lr_ratio=0.0)


def bytes_of_a_step(**options) -> int:
    """What one layer with LoRA on its feed-forward's last projection keeps, beside frozen and trained values."""
    model = tiny.model("llama", "float32")
    adapter = sites.attach(model, "lora", {"r": 8, "targets": ["1.mlp.down_proj"], **options})
    x = parameter(np.random.default_rng(0).standard_normal((BATCH, TIME, 32)).astype("f4"))
    y = model.sites["model.layers.1.mlp.down_proj"](x + x)
    values = (adapter.params | adapter.constants).values()
    return sum(kept(y, [x.data, *frozen(model), *(tensor.data for tensor in values)]).values())


def test_with_a_frozen_A_a_step_keeps_r_numbers_of_a_token_and_not_its_input():
    assert bytes_of_a_step() - bytes_of_a_step(freeze_A=True) == BATCH * TIME * 32 * SIZE


def test_the_biases_of_lora_are_those_of_its_linear_targets():
    adapter = sites.attach(tiny.model("qwen2"), "lora", {"bias": "lora_only", "targets": ["@embed", "@q"]})
    biases = [name for name in adapter.params if name.endswith("bias")]
    assert biases == [f"model.layers.{number}.self_attn.q_proj.bias" for number in range(2)]
