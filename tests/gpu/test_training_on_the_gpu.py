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

pytestmark = pytest.mark.filterwarnings("ignore:steps are not captured:refpeft.errors.RefpeftWarning")
SETTINGS = Train(steps=3, batch=4, lr=0.01, schedule="constant", warmup=0)


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_have_the_values_of_the_host(method: str):
    here, there = models = [tiny.model("llama", "float64", needed_quantizer(method), xp=xp) for xp in (np, cupy)]
    for model in models:
        sites.attach(model, method, OPTIONS.get(method))
    for (_, first), (_, copy) in zip(here.trained(), there.trained(), strict=True):
        copy.data = cupy.asarray(first.data)  # decompositions may choose other signs on a GPU
    for model in models:
        Trainer(model, Batches(examples(), 4, 32), None, SETTINGS).run()
    expected, found = (dict(model.trained()) for model in models)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        limit = 1e-7 * (1 + abs(value.data).max())
        assert np.allclose(to_host(found[name].data), value.data, rtol=0, atol=limit), name
