"""Losses, gradients and predictions of every task on the GPU against the host."""

import cupy
import numpy as np
import pytest
import tiny_tasks

from refpeft.backend import to_host
from refpeft.tensor import no_grad


@pytest.mark.parametrize("family, task", tiny_tasks.CASES)
def test_every_task_has_the_loss_and_the_gradients_of_the_host(family, task):
    batch, found = tiny_tasks.batch(family, task), []
    for xp in (np, cupy):
        model = tiny_tasks.model(family, task, xp)
        loss = model.loss(batch)
        loss.backward()
        found.append({"loss": to_host(loss.data)} | {name: to_host(t.grad) for name, t in model.trained()})
    here, there = found
    assert here.keys() == there.keys()
    for name, expected in here.items():
        assert np.allclose(there[name], expected, rtol=0, atol=1e-11 * (1 + abs(expected).max())), name


@pytest.mark.parametrize("family, task", [case for case in tiny_tasks.CASES if case[1] != "seq2seq"])
def test_every_head_says_what_it_says_on_the_host(family, task):
    batch, found = tiny_tasks.batch(family, task), []
    for xp in (np, cupy):
        with no_grad():
            found.append(to_host(tiny_tasks.model(family, task, xp)(batch.ids, segments=batch.segments).data))
    real = batch.segments >= 0 if found[0].ndim == 3 else slice(None)
    assert np.allclose(found[0][real], found[1][real], rtol=0, atol=1e-11 * abs(found[0][real]).max())
