"""A training step is array code alone: no value is read by the host, and host and device arrays never meet.

Both are tried without a GPU, on the arrays of refpeft.conformance.device; tests/gpu holds the same code against real
ones.
"""

import numpy as np
import pytest
import tiny
import tiny_tasks
from cases import FUSED, OPS, Case, Place
from test_trainer import examples
from variants import TO_FIT, needed_quantizer

from refpeft import learning, manager, sites, survey
from refpeft.backend import to_host
from refpeft.batches import Batch, Batches
from refpeft.config import Train
from refpeft.conformance import device
from refpeft.optim import AdamW, Flat
from refpeft.quant import Quantizer, make_quantizer
from refpeft.rng import Stream
from refpeft.tensor import parameter, plain

METHODS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "method")
QUANTIZERS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "quantizer")

OPTIONS = TO_FIT | {"lora": {"dropout": 0.2}, "bitfit": {"create": True}}


@pytest.fixture
def xp(monkeypatch):
    """The stand-in; within a test the host computes with the plain pairs too: its own are not the same to the bit."""
    with plain():
        yield device.install(monkeypatch)


@pytest.mark.parametrize("case", OPS + FUSED, ids=str)
def test_every_op_runs_on_the_device_to_the_same_bits(case: Case, xp):
    results = []
    for place in (Place("f4"), Place("f4", xp)):
        leaves = [parameter(array) for array in case.arrays(place)]
        with device.capture():
            out = case(*leaves, place=place)
            out.backward()
        results.append([to_host(a) for a in (out.data, *(leaf.grad for leaf in leaves))])
    for host, there in zip(*results, strict=True):
        assert np.array_equal(host, there)


def test_random_numbers_are_the_same_bits_on_the_device(xp):
    here, there = Stream(3, "a"), Stream(3, "a", xp=xp)
    for draw in (
        lambda stream: stream.bits(7),
        lambda stream: stream.uniform(-1, 1, (2, 3)),
        lambda stream: stream.standard_normal(5),
        lambda stream: stream.permutation(9),
    ):
        assert np.array_equal(draw(here), to_host(draw(there)))


def step(name: str, method: str, xp, quantizer: Quantizer | None = None, checkpointing: bool = False) -> dict:
    """Loss and trained values after one training step with dropout and clipping, on rows with padding, by name."""
    model = tiny.model(name, "float32", quantizer, xp=xp)
    sites.attach(model, method, OPTIONS.get(method))
    survey.settle(model, Batches(examples(), 4, 32), Train(batch=4), 0)  # may read what it likes
    model.mode.training, model.checkpointing = True, checkpointing
    batch = tiny.batch()
    segments = np.where(np.arange(9) < [[9], [6]], 0, -1).astype("i4")
    batch = Batch(batch.ids, np.where(segments < 0, -100, batch.targets), segments=segments)
    flat = Flat(model.trained(), learning.rates(model))
    learning.states(model)
    optimizer = AdamW(flat, weight_decay=0.1)
    with device.capture():
        loss = learning.objective(model, batch, batch.supervised)
        loss.backward()
        for penalty in learning.penalties(model):
            penalty.backward()
        flat.clip(0.1)
        learning.step(model, lambda: optimizer.step(1e-2), 0, 1)
    return {"loss": to_host(loss.data)} | {key: to_host(tensor.data) for key, tensor in model.trained()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_reads_nothing_and_is_the_hosts(name: str, method: str, xp):
    there, here = (step(name, method, module, needed_quantizer(method)) for module in (xp, np))
    assert there.keys() == here.keys()
    for key, value in here.items():
        assert np.array_equal(there[key], value), key


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_step_on_quantized_weights_reads_nothing_and_is_the_hosts(quantizer: str, xp):
    packer = make_quantizer(quantizer)
    there, here = (step("wide", "lora", module, packer, checkpointing=True) for module in (xp, np))
    for key, value in here.items():
        assert np.array_equal(there[key], value), key


def test_the_stand_in_catches_reads_and_mixtures(xp):
    array = xp.asarray(np.arange(3.0))
    for read in (bool, float, int, list, lambda a: a[0].item(), lambda a: a[a > 1], xp.nonzero, lambda a: a.tolist()):
        with pytest.raises(device.HostRead), device.capture():
            read(array)
    for mix in (lambda a: a + np.ones(3), lambda a: np.ones(3) * a, np.asarray, lambda a: np.concatenate((a, a))):
        with pytest.raises(TypeError):
            mix(array)
    assert isinstance(np.float32(2) * array, device.Array)


@pytest.mark.parametrize("family, task", tiny_tasks.CASES)
def test_every_task_has_a_step_without_a_read_of_the_host(family, task, xp):
    batch, found = tiny_tasks.batch(family, task), []
    for place in (np, xp):
        model = tiny_tasks.model(family, task, place)
        with device.capture():
            loss = learning.objective(model, batch, batch.denominator)
            loss.backward()
        found.append({"loss": to_host(loss.data)} | {name: to_host(t.grad) for name, t in model.trained()})
    here, there = found
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)
