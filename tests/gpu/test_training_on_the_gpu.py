"""Runs of the trainer on the GPU against the same runs on the host, with all that methods do before and at a step."""

import cupy
import numpy as np
import pytest
import tiny
from test_no_host_read import METHODS, OPTIONS
from test_trainer import examples
from variants import needed_quantizer

from refpeft import sites
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.trainer import Trainer

SETTINGS = Train(steps=3, batch=4, lr=0.01, schedule="constant", warmup=0)


def values(method: str, xp) -> dict:
    """What three steps on float64 weights make of the method's values, by name."""
    model = tiny.model("llama", "float64", needed_quantizer(method), xp=xp)
    sites.attach(model, method, OPTIONS.get(method))
    Trainer(model, Batches(examples(), 4, 32), None, SETTINGS).run()
    return {name: to_host(tensor.data) for name, tensor in model.trained()}


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_have_the_values_of_the_host(method: str):
    here, there = (values(method, xp) for xp in (np, cupy))
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert np.allclose(there[name], value, rtol=0, atol=1e-7 * (1 + abs(value).max())), name
