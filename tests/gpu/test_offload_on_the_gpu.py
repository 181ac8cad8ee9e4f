"""Inputs of layers on the host between forward and backward: the same bits, and two of them on the device."""

import weakref

import cupy
import numpy as np
import pytest
import tiny
from test_capture_on_the_gpu import assert_same, launches, tiny_shapes  # noqa: F401  the last two are fixtures
from test_trainer import examples

from refpeft import sites
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.cuda.offload import Offload
from refpeft.models.base import Model
from refpeft.tensor import checkpoint, parameter
from refpeft.trainer import Trainer

CONFIG = tiny.CONFIGS["llama"] | {"num_hidden_layers": 3}


def fresh(method: str = "lora", low: bool = False, **options) -> Model:
    model = tiny.of(CONFIG, xp=cupy, dtype="f4")
    if low:
        tiny.in_bfloat16(model)
    tiny.scramble(sites.attach(model, method, options or None))
    return model


def run(model: Model, offload: bool, **settings) -> Trainer:
    settings = {"steps": 3, "batch": 2, "lr": 0.01, "checkpoint_activations": True} | settings
    trainer = Trainer(
        model,
        Batches(examples(4), settings["batch"], 32),
        None,
        Train(**settings, offload_activations=offload),
        None,
        seed=1,
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1}, {"kl": 0.5}], ids=str)
def test_steps_have_the_bits_of_those_that_keep_all_there_captured_and_eager(launches, low: bool, settings):  # noqa: F811
    stays, moves, eager = (
        run(fresh(low=low, dropout=0.2), offload, capture=capture, **settings)
        for offload, capture in ((False, True), (True, True), (True, False))
    )
    assert launches["captures"] >= 2 and launches["runs"] >= 2
    assert_same(moves, stays)
    assert_same(moves, eager)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "top_layers", "houlsby"])
def test_whatever_is_trained(method: str):
    assert_same(*(run(fresh(method), offload) for offload in (True, False)))


@pytest.fixture
def copies(monkeypatch):
    """Counts copies to the host and back."""
    found, copy = [], Offload._copy

    def count(self, away, to, source, kind):
        found.append(kind)
        copy(self, away, to, source, kind)

    monkeypatch.setattr(Offload, "_copy", count)
    return found


def test_two_inputs_are_on_the_device_at_a_time(copies):
    offload, model, there, most = Offload(), tiny.model("llama", xp=cupy), [], []

    def layer(x):
        most.append(sum(ref() is not None for ref in there))
        return x * 2.0 * w

    w = parameter(cupy.full(4, 0.5))
    with offload.of(model):
        for _ in range(2):
            there.clear()
            x = parameter(cupy.arange(12.0).reshape(3, 4))
            leaf = x
            for _ in range(6):
                x = x * 1.0
                there.append(weakref.ref(x.data))
                x = checkpoint(layer, x, put_away=model.put_away)
            x.backward(cupy.ones((3, 4)))
            assert np.array_equal(leaf.grad.get(), np.ones((3, 4)))
            assert max(most) <= 2
    assert copies.count(2) == 12 and copies.count(1) == 10  # the last input of a pass has not left
    assert not offload._away and sum(map(len, offload._free.values())) == 6  # the second pass took the first one's room


def test_what_nobody_asks_for_frees_its_room(copies):
    offload, model = Offload(), tiny.model("llama", xp=cupy)
    w = parameter(cupy.ones(3))
    with pytest.raises(ZeroDivisionError), offload.of(model):
        for _ in range(3):
            checkpoint(lambda x: x * w, parameter(cupy.ones(3)), put_away=model.put_away)
        raise ZeroDivisionError
    assert model.put_away is None and not offload._away and len(offload._free[24]) == 3


def test_what_is_no_array_in_rows_stays():
    offload, model = Offload(), tiny.model("llama", xp=cupy)
    w, x = parameter(cupy.ones(3)), parameter(cupy.arange(12.0).reshape(3, 4).T)
    with offload.of(model):
        out = checkpoint(lambda x: x * w, x, put_away=model.put_away)
        assert not offload._away
        out.backward(cupy.ones((4, 3)))
    assert np.array_equal(w.node.grad.get(), [6.0, 22.0, 38.0])
