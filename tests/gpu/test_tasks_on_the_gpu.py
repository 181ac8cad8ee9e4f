"""Losses, gradients and predictions of every task on the GPU against the host."""

import cupy
import numpy as np
import pytest
import tiny
import tiny_tasks

from refpeft import sites
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.evaluation import mean_loss
from refpeft.examples import Example
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


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_held_out_rows_of_all_lengths_have_the_loss_of_the_host_and_come_in_few_lengths(method):
    texts = [Example(np.arange(n, dtype="i4") % 40, np.arange(n) > n // 2, n) for n in range(5, 63)]
    rows, found, shapes = Batches(texts, 2, 64, shuffle=False), [], set()
    for xp in (np, cupy):
        model = tiny.model("llama", xp=xp)
        tiny.scramble(sites.attach(model, method))
        trunk = model.trunk
        model.trunk = lambda ids, *rest, trunk=trunk, **more: shapes.add(ids.shape) or trunk(ids, *rest, **more)
        shapes.clear()
        found.append(mean_loss(model, rows))
    assert found[0] == pytest.approx(found[1], rel=1e-11) and len(shapes) <= 8
