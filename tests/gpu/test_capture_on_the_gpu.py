"""Training steps as CUDA graphs: the bits of eager steps, in every run, of every shape, and after an interruption."""

import gc
import types
import warnings
import weakref

import cupy
import numpy as np
import pytest
import tiny
import tiny_tasks
from test_no_host_read import METHODS, OPTIONS
from test_trainer import examples
from variants import needed_quantizer

from refpeft import placing, sites
from refpeft.backend import to_host
from refpeft.batches import Batch, Batches
from refpeft.config import Train
from refpeft.cuda import graph, override
from refpeft.errors import RefpeftError, RefpeftWarning
from refpeft.examples import Example
from refpeft.models.base import Model
from refpeft.trainer import Trainer

SETTINGS = {"steps": 20, "batch": 4, "lr": 0.01}
NOT_CAPTURED = {
    "adapterdrop": "adapterdrop draws",
    "adamix": "adamix draws",
}
"""Methods whose steps stay eager, and what is said of it."""


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(placing, "UNIT", 16)
    monkeypatch.setattr(override, "_said", set())


def fresh(method: str = "lora", xp=cupy, dtype: str = "float32", **options) -> Model:
    model = tiny.model("llama", dtype, needed_quantizer(method), xp=xp)
    tiny.scramble(sites.attach(model, method, options or OPTIONS.get(method)))
    return model


def run(model: Model, rows: list[Example] | None = None, out=None, resume: bool = False, **settings) -> Trainer:
    settings = Train(**SETTINGS | settings)
    held_out = Batches(examples(4, seed=9), 4, 64, shuffle=False) if settings.eval_every else None
    batches = Batches(rows or examples(), settings.batch, 64, by_length=settings.group_by_length)
    trainer = Trainer(model, batches, held_out, settings, out, seed=1)
    trainer.run(resume)
    return trainer


def values(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: to_host(tensor.data) for name, tensor in trainer.model.trained()}


def assert_same(one: Trainer, other: Trainer) -> None:
    """The same bits of losses, values and the optimizer's state."""
    assert one.summary.train_losses == other.summary.train_losses
    for found, expected in ((values(one), values(other)), (one.optimizer.state, other.optimizer.state)):
        assert all(np.array_equal(to_host(found[name]), to_host(expected[name])) for name in expected)


@pytest.fixture
def launches(monkeypatch):
    """Counts captures and launches of graphs."""
    found = {"captures": 0, "runs": 0}
    captured, ran = graph.Graphs._graph_of, graph.Graphs.run

    def capture(self, work):
        found["captures"] += 1
        return captured(self, work)

    def count(self, key, step, work):
        given = ran(self, key, step, work)
        found["runs"] += key in self._captured
        return given

    monkeypatch.setattr(graph.Graphs, "_graph_of", capture)
    monkeypatch.setattr(graph.Graphs, "run", count)
    return found


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch": 2}, {"checkpoint_activations": True}, {"l2_sp": 0.1}, {"kl": 0.5}]
)
def test_twenty_captured_steps_are_the_eager_ones_and_the_hosts(settings, launches):
    captured = run(fresh(r=3), **settings)
    captures, runs = launches.values()
    assert 1 <= captures <= 2 and runs == 20 - captures  # of one shape or two
    assert_same(captured, run(fresh(r=3), capture=False, **settings))
    assert launches["captures"] == captures
    host = run(fresh(xp=np, r=3), **settings)
    assert np.allclose(captured.summary.train_losses, host.summary.train_losses, rtol=1e-4)
    for name, value in values(host).items():
        assert abs(values(captured)[name] - value).max() <= 1e-3 * abs(value).max(), name


def test_masks_differ_from_step_to_step_and_are_those_of_eager_steps():
    rows = examples(4)  # the same in every step
    captured, eager = (run(fresh(dropout=0.5), rows, lr=1e-9, capture=capture) for capture in (True, False))
    assert_same(captured, eager)
    assert len(set(captured.summary.train_losses)) > 15


def test_a_run_has_the_same_bits_again_and_goes_on_with_them(tmp_path):
    whole, again = run(fresh(dropout=0.2), out=tmp_path / "a"), run(fresh(dropout=0.2), out=tmp_path / "b")
    assert_same(whole, again)
    settings = Train(**SETTINGS, save_every=7)
    stopped = Trainer(fresh(dropout=0.2), Batches(examples(), 4, 64), None, settings, tmp_path / "c", seed=1)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 16:
            raise Stop

    stopped.listeners = (stop,)
    with pytest.raises(Stop):
        stopped.run()
    assert_same(run(fresh(dropout=0.2), out=tmp_path / "c", resume=True, save_every=7), whole)


def test_several_shapes_take_turns_each_with_its_graph(launches):
    rng = np.random.default_rng(0)
    rows = []
    for line in range(1, 23):  # of 16, 32 and 48 tokens; the last batch of an epoch is smaller
        ids = rng.integers(0, 40, 14 + 16 * (line % 3)).astype("i4")
        rows.append(Example(ids, np.arange(len(ids)) > 3, line))
    captured = run(fresh(), rows, steps=36, group_by_length=True, eval_every=7)
    assert 3 <= launches["captures"] <= graph.MOST and launches["runs"] >= 20
    assert_same(captured, run(fresh(), rows, steps=36, group_by_length=True, capture=False))


def test_more_shapes_than_graphs_are_kept_of(launches, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 1)
    rows = examples(8, seed=3) + [Example(np.arange(30, dtype="i4"), np.ones(30, bool), 9)] * 8
    captured = run(fresh(), rows, group_by_length=True)
    assert launches["captures"] > 2
    assert_same(captured, run(fresh(), rows, group_by_length=True, capture=False))


def test_a_graph_holds_the_plans_of_its_transforms(monkeypatch):
    """CuPy's cache may drop them, and their memory with them."""

    class Plan:
        pass

    def cached():
        return Cache([("key", types.SimpleNamespace(plan=plan)) for plan in plans])

    class Cache(list):
        def set_size(self, size: int) -> None:
            assert size >= graph.MOST

    plans = [Plan(), Plan()]
    monkeypatch.setattr(cupy.fft, "config", types.SimpleNamespace(get_plan_cache=cached))
    dropped = [weakref.ref(plan) for plan in plans]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        graphs, array = graph.Graphs(stream), cupy.zeros(3, "f4")
        for step in range(2):
            graphs.run("key", step, lambda: array + 1)
        plans.clear()
        gc.collect()
        assert len(graphs) == 1 and all(plan() for plan in dropped)
        graphs.give_back()
    gc.collect()
    assert not any(plan() for plan in dropped)


@pytest.mark.parametrize(
    "family, task", [("bert", "classify"), ("bert", "mlm"), ("bert", "embed"), ("llama", "regress")]
)
def test_other_tasks_are_captured_too(family, task, launches):
    class Rows(Batches):
        """One batch, again and again."""

        rows, longest, steps_per_epoch, of_pairs_alone = [], 9, 1, False

        def __init__(self):
            pass

        def at(self, step: int) -> Batch:
            return tiny_tasks.batch(family, task)

    runs = []
    for capture in (True, False):
        runs.append(Trainer(tiny_tasks.model(family, task, cupy), Rows(), None, Train(**SETTINGS, capture=capture)))
        runs[-1].run()
    assert launches["captures"] == 1
    assert_same(*runs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_captured_or_says_why_not(method):
    settings = {"steps": 5, "micro_batch": 2}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RefpeftWarning)
        captured = run(fresh(method), **settings)
    told = [str(one.message) for one in said if "CUDA graph" in str(one.message)]
    if method in NOT_CAPTURED:
        assert len(told) == 1 and NOT_CAPTURED[method] in told[0]
    else:
        assert not told
    assert_same(captured, run(fresh(method), capture=False, **settings))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_is_not_a_number_is_not_learned_from(launches):
    def poison(record):
        if record["step"] == 5:
            kept.update(values(trainer))
            trainer.model.frozen["model.norm.weight"]()[...] = np.nan

    kept, settings = {}, Train(**SETTINGS)
    trainer = Trainer(fresh(), Batches(examples(), 4, 64), None, settings, listeners=(poison,), seed=1)
    with pytest.raises(RefpeftError, match=r"^loss is nan at step 6"):
        trainer.run()
    assert launches["runs"]
    assert all(np.array_equal(array, kept[name]) for name, array in values(trainer).items())


def test_without_memory_for_a_graph_a_run_goes_on_eagerly(monkeypatch):
    def none(self, work):
        self._stream.begin_capture()
        work()
        self._stream.end_capture()
        raise MemoryError("no memory is left for a graph")

    monkeypatch.setattr(graph.Graphs, "_graph_of", none)
    with pytest.warns(RefpeftWarning, match="no memory is left for a graph"):
        found = run(fresh())
    assert_same(found, run(fresh(), capture=False))


def test_without_memory_beside_graphs_these_are_given_back(launches, monkeypatch):
    """Once a graph is there, a step fails in the middle of its backward pass."""
    failed, ran = [], graph.Graphs.run

    def fails_once(self, key, step, work):
        if step == 12 and not failed:
            failed.append(len(self))
            raise MemoryError
        return ran(self, key, step, work)

    monkeypatch.setattr(graph.Graphs, "run", fails_once)
    found = run(fresh(r=3))
    assert failed[0] and launches["captures"] > failed[0]  # they came again
    assert_same(found, run(fresh(r=3), capture=False))


def test_out_of_memory_is_told_as_on_the_host(monkeypatch):
    def fails(self, *args):
        raise cupy.cuda.memory.OutOfMemoryError(1 << 40, 0, 0)

    monkeypatch.setattr(Trainer, "_backward", fails)
    with pytest.raises(RefpeftError, match=r"^out of memory.* What helps: "):
        run(fresh())
