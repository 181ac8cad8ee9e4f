"""Shards: twins compute what their model does, and the sum over shares is the gradient of the whole."""

import time

import numpy as np
import pytest
import threadpoolctl
import tiny
from test_every_model import KINDS, TASKS, headed, rows
from test_every_model import attached as other_families
from test_heads import asked
from test_trainer import examples
from variants import VARIANTS, attached, bare

from refpeft import backend, sites
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.models.base import Model
from refpeft.optim import Flat
from refpeft.shards import Shards, twin
from refpeft.trainer import Trainer


def gradients(model: Model) -> dict[str, np.ndarray]:
    """Of every trained value, for one batch in training; they begin as zeros."""
    model.mode.training = True
    model.loss(tiny.batch()).backward()
    model.mode.training = False
    return {name: tensor.node.grad for name, tensor in model.trained()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_has_the_gradients_of_its_model_bit_for_bit_in_leaves_of_its_own(name):
    model, _ = attached("llama", name, dtype="float32")
    other = twin(model)
    ours = gradients(model)
    assert all(tensor.node.grad is None for _, tensor in other.trained())
    theirs = gradients(other)
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        if grad is None:
            assert theirs[key] is None
            continue
        assert np.array_equal(grad, theirs[key]), key
        assert not np.shares_memory(grad, theirs[key]), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_shares_every_array(name):
    model, _ = attached("llama", name, dtype="float32")
    other = twin(model)
    for key, frozen in model.frozen.items():
        assert other.frozen[key] is frozen, key
    for (key, ours), (_, theirs) in zip(model.trained(), other.trained(), strict=True):
        assert ours.data is theirs.data, key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_without_its_adapter_is_the_base(name):
    model, adapter = attached("llama", name, dtype="float32")
    other = twin(model)
    with sites.bypassed(other):
        without = other(tiny.ids()).data
    assert not np.array_equal(model(tiny.ids()).data, without)  # nor did taking it off there take it off here
    sites.detach(model, adapter)
    assert np.array_equal(model(tiny.ids()).data, without)


def trained(threads: int, dtype: str = "float64", method: str = "lora", **settings) -> tuple[np.ndarray, list[float]]:
    """The values after some steps, and the losses on the way."""
    model = bare("llama", method, dtype=dtype)
    tiny.scramble(sites.attach(model, *VARIANTS[method]))
    train = Train(steps=4, batch=5, lr=0.01, threads=threads, **settings)
    trainer = Trainer(model, Batches(examples(10), 5, 32, seed=1), None, train)
    assert len(trainer.shards) == threads
    trainer.run()
    return trainer.flat.values, trainer.summary.train_losses


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1}, {"kl": 0.5}, {"checkpoint_activations": True}])
def test_more_threads_train_the_same_to_rounding(threads, settings):
    alone, losses = trained(1, **settings)
    values, others = trained(threads, **settings)
    assert np.abs(values - alone).max() <= 1e-12 * np.abs(alone).max()
    assert others == pytest.approx(losses, rel=1e-13)


def test_the_same_threads_train_the_same_bits():
    first, losses = trained(3, "float32")
    again, others = trained(3, "float32")
    assert np.array_equal(first, again)
    assert losses == others


def test_where_much_is_trained_there_is_one_shard():
    model = tiny.model("llama")
    sites.attach(model, "full", {"targets": ["@up", "@down"]})
    trainer = Trainer(model, Batches(examples(), 4, 32), None, Train(steps=1, batch=4, threads=2))
    assert len(trainer.shards) == 1


def test_an_error_in_one_share_is_told_after_all_have_ended_and_leaves_no_gradients():
    model, _ = attached("llama", "lora", dtype="float32")
    flat, ended = Flat(model.trained()), []
    with backend.blas_threads(0, 2):
        shards = Shards(model, flat)

    def work(one: Model, share: int) -> None:
        one.loss(tiny.batch()).backward()
        if not share:
            raise RefpeftError("the first share")
        time.sleep(0.05)
        ended.append(share)

    with pytest.raises(RefpeftError, match="the first share"):
        shards.run(work, [0, 1])
    assert ended == [1]
    assert not flat.grads.any()
    with pytest.raises(RefpeftError, match="the first share"):
        shards.run(work, [0])
    assert not flat.grads.any()


def blas() -> int:
    return max(library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas")


def test_blas_has_one_thread_in_each_of_several_shares_and_all_in_a_single_one():
    model, _ = attached("llama", "lora", dtype="float32")
    with backend.blas_threads(0, 2):
        shards = Shards(model, Flat(model.trained()))
        assert shards.run(lambda _, share: blas(), [0, 1]) == [1, 1]
        assert shards.run(lambda _, share: blas(), [0]) == [2]
        with threadpoolctl.threadpool_limits(3, user_api="blas"):  # set by something else between two steps
            assert shards.run(lambda _, share: blas(), [0, 1]) == [1, 1]
        assert blas() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_twins_of_encoders_and_of_t5_compute_the_same(kind):
    model, _ = other_families(kind, "lora")
    assert np.array_equal(twin(model)(**rows(kind)).data, model(**rows(kind)).data)


@pytest.mark.parametrize(("kind", "task"), TASKS.items())
def test_twins_have_the_head_of_a_task(kind, task):
    model, batch = headed(kind, "lora", 0), asked(kind, task)
    tiny.scramble(sites.attach(model, "lora"))
    assert np.array_equal(twin(model).loss(batch).data, model.loss(batch).data)
