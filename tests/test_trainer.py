"""Training: exact accumulation, evaluation, stopping, checkpoints of one run only, and runs killed at any point."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_files

from refpeft import files, sites
from refpeft.batches import Batches, split
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.examples import Example
from refpeft.files import read_safetensors
from refpeft.quant import make_quantizer
from refpeft.trainer import Trainer


def examples(count: int = 8, seed: int = 0) -> list[Example]:
    """Rows of 5 to 14 tokens; each learns some of them, at least one."""
    rng, rows = np.random.default_rng(seed), []
    for line in range(1, count + 1):
        length = int(rng.integers(5, 15))
        supervised = rng.random(length) < 0.5
        supervised[-1] = True
        rows.append(Example(rng.integers(0, 40, length).astype("i4"), supervised, line))
    return rows


def trainer(
    settings: Train,
    method: str = "lora",
    held_out: bool = True,
    out=None,
    listeners=(),
    seed: int = 0,
    quantizer: str | None = None,
    **options,
) -> Trainer:
    model = tiny.model("llama", quantizer=make_quantizer(quantizer))
    tiny.scramble(sites.attach(model, method, options, seed=seed))
    evaluation = Batches(examples(4, seed=9), 4, 32, shuffle=False) if held_out else None
    return Trainer(
        model, Batches(examples(), settings.batch, 32, seed=seed), evaluation, settings, out, listeners, seed
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(rows):
    built = trainer(Train(batch=8))
    batch = built.train.at(0)
    whole = built.model.loss(batch)
    whole.backward()
    expected, loss = built.flat.grads.copy(), float(whole.data)
    built.flat.grads.fill(0)
    parts = [built.model.loss(part, batch.supervised) for part in split(batch, rows)]
    for part in parts:
        part.backward()
    assert len({part.supervised for part in split(batch, 1)}) > 1  # else any weighting of the parts would pass
    assert float(sum(part.data for part in parts)) == pytest.approx(loss, rel=1e-14)
    assert np.abs(built.flat.grads - expected).max() <= 1e-12 * np.abs(expected).max()


def test_eight_single_rows_train_as_one_batch_of_eight_does():
    runs = [trainer(Train(steps=5, batch=8, micro_batch=micro, lr=0.01)) for micro in (8, 1)]
    for run in runs:
        run.run()
    one, other = (run.flat.values for run in runs)
    assert np.abs(one - other).max() <= 1e-12 * np.abs(one).max()


def test_training_lowers_the_loss_and_tells_every_step():
    records = []
    built = trainer(Train(steps=20, batch=4, lr=0.01, eval_every=5), listeners=(records.append,))
    summary = built.run()
    assert summary.train_losses[-1] < summary.train_losses[0]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 5, 10, 15, 20]
    assert summary.after["loss"] == records[-1]["eval_loss"]


def test_the_mean_loss_does_not_depend_on_how_rows_are_batched():
    built = trainer(Train())
    losses = [
        mean_loss(built.model, Batches(examples(), batch, 64, pack))
        for batch, pack in ((1, False), (5, False), (2, True))
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-13)


def test_epochs_become_steps_and_steps_win():
    assert trainer(Train(batch=3, epochs=2)).total == 6
    assert trainer(Train(batch=3, epochs=0.5)).total == 2
    assert trainer(Train(batch=3, epochs=2, steps=7)).total == 7


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_keeps_the_last_checkpoint(tmp_path):
    def poison(record):
        if record.get("step") == 3 and "loss" in record:
            next(iter(built.flat.params.values())).data[...] = np.nan

    built = trainer(Train(steps=9, batch=4, save_every=2), out=tmp_path, listeners=(poison,), held_out=False)
    with pytest.raises(RefpeftError, match=r"loss is nan at step 4 .*step-00000002; lower the learning rate"):
        built.run()
    assert np.isfinite(read_safetensors(tmp_path / "checkpoints/step-00000002/state.safetensors")["values"]).all()


def test_a_held_out_loss_that_is_not_finite_stops_the_run():
    built = trainer(Train(steps=2, batch=4))
    next(iter(built.flat.params.values())).data[...] = np.nan
    with pytest.raises(RefpeftError, match=r"^held-out loss is nan after step 0, before anything was learned"):
        built.run()


def test_rows_that_the_model_has_no_positions_for_are_refused_before_the_first_step():
    model = tiny.model("gpt2")
    sites.attach(model, "prompt_tuning", {"tokens": 60})
    with pytest.raises(
        RefpeftError, match=r"^the longest row has 13 tokens, .* the model has room for 4: set a smaller"
    ):
        Trainer(model, Batches(examples(), 4, 32), settings=Train(steps=1, batch=4))


def test_offload_is_for_a_gpu_and_says_so():
    settings = Train(batch=4, checkpoint_activations=True, offload_activations=True)
    with pytest.raises(RefpeftError, match="from a GPU's memory to the host's: choose device 'cuda', or leave it out"):
        trainer(settings)


def test_early_stopping_counts_evaluations_without_a_better_loss(tmp_path):
    built = trainer(
        Train(steps=50, batch=4, lr=0.5, schedule="constant", eval_every=1, early_stop=3, best=True), out=tmp_path
    )
    summary = built.run()
    assert summary.stopped_early
    assert summary.steps == summary.best_step + 3
    assert summary.after["loss"] == summary.best["loss"]
    assert mean_loss(built.model, built.evaluation.batches) == summary.best["loss"]


def test_the_best_adapter_comes_back_with_the_constants_that_it_had(tmp_path):
    settings, seen = Train(steps=6, batch=4, eval_every=1, best=True), []
    built = trainer(settings, "sparse_adapter", out=tmp_path, prune="threshold")  # in the last step

    class Worse:
        """Each evaluation is worse than the one before."""

        longest = 8

        def __call__(self):
            seen.append({name: array.copy() for name, array in built.constants.items()})
            return {"loss": float(len(seen))}

    built.evaluation = Worse()
    assert built.run().best_step == 1
    assert any((seen[1][name] != seen[-1][name]).any() for name in seen[1])
    assert all(np.array_equal(array, seen[1][name]) for name, array in built.constants.items())


def test_the_best_adapter_needs_held_out_rows_and_a_place(tmp_path):
    with pytest.raises(RefpeftError, match="held-out rows and a run directory"):
        trainer(Train(best=True), held_out=False, out=tmp_path)
    with pytest.raises(RefpeftError, match="held-out rows and a run directory"):
        trainer(Train(best=True))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer(Train(steps=9, batch=4, save_every=2, keep=2), out=tmp_path).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]


def test_a_checkpoint_from_before_a_setting_says_which(tmp_path):
    trainer(Train(steps=4, batch=4), out=tmp_path).run()
    state = files.read_json(tmp_path / "checkpoints" / "step-00000004" / "state.json")
    del state["run"]["clip"]
    files.write_json(tmp_path / "checkpoints" / "step-00000004" / "state.json", state)
    with pytest.raises(RefpeftError, match=r"is of another run: clip was not known, now 1\.0; use another --out"):
        trainer(Train(steps=4, batch=4), out=tmp_path).run(resume=True)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    trainer(Train(steps=4, batch=4), out=tmp_path).run()
    with pytest.raises(RefpeftError, match=r"is of another run: lr was 0\.0002, now 0\.5; use another --out"):
        trainer(Train(steps=4, batch=4, lr=0.5), out=tmp_path).run(resume=True)
    with pytest.raises(RefpeftError, match=r"another run: lora\.alpha was 16\.0, now 4\.0; use another"):
        trainer(Train(steps=4, batch=4), out=tmp_path, alpha=4.0).run(resume=True)
    with pytest.raises(RefpeftError, match=r"another run: lora\.r was 8, now 2; use another"):
        trainer(Train(steps=4, batch=4), out=tmp_path, r=2).run(resume=True)
    with pytest.raises(RefpeftError, match=r"another run: warm-up steps was 1, now 2;"):
        trainer(Train(steps=4, batch=4, warmup=2), out=tmp_path).run(resume=True)
    with pytest.raises(RefpeftError, match=r"holds another run's checkpoints: resume it"):
        trainer(Train(steps=4, batch=4), out=tmp_path).run()


def test_a_checkpoint_of_a_run_on_other_quantized_weights_is_refused(tmp_path):
    trainer(Train(steps=4, batch=4), out=tmp_path, quantizer="nf4").run()
    with pytest.raises(RefpeftError, match=r"weights was \['nf4 \(.*\)'\], now \['fp4 \(.*\)'\]; use another"):
        trainer(Train(steps=4, batch=4), out=tmp_path, quantizer="fp4").run(resume=True)  # in as many bytes


def test_a_finished_run_that_is_resumed_trains_no_more(tmp_path):
    first = trainer(Train(steps=4, batch=4), out=tmp_path)
    first.run()
    again = trainer(Train(steps=4, batch=4), out=tmp_path, seed=0)
    assert again.run(resume=True).after == first.summary.after
    assert np.array_equal(again.flat.values, first.flat.values)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    trainer(Train(steps=4, batch=4, save_every=2), out=tmp_path).run()
    (tmp_path / "checkpoints/step-00000004/state.json").write_text('{"run": 1')
    with pytest.raises(RefpeftError, match=r"step-00000004 cannot be read: .*remove it to go on from an older one"):
        trainer(Train(steps=4, batch=4), out=tmp_path).run(resume=True)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit_with_dropout_and_accumulation(tmp_path):
    def attached(out):
        model = tiny.model("gpt2", dtype="float32")
        sites.attach(model, "lora", {"dropout": 0.2}, seed=3)
        settings = Train(steps=10, batch=4, micro_batch=3, save_every=3, lr=0.01, weight_decay=0.1)
        return Trainer(model, Batches(examples(), 4, 32, seed=3), None, settings, out, seed=3)

    whole = attached(tmp_path / "whole")
    whole.run()
    cut = attached(tmp_path / "cut")
    cut._restore()
    for _ in range(4):
        cut._step()
        if cut._due(3):
            cut._save()
    again = attached(tmp_path / "cut")  # a new process would start so: from the checkpoint of step 3
    again.run(resume=True)
    for name, array in whole._arrays.items():
        assert np.array_equal(array, again._arrays[name]), name
    assert again.summary.train_losses == whole.summary.train_losses


# ---- killed runs -----------------------------------------------------------------------------------------------------

DRIVER = """
    import os, signal, sys
    from refpeft.cli import main
    left = int(sys.argv.pop(1))  # dies in place of this call of a function that makes files last; 0: never

    def dying(real):
        def call(*args, **keywords):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **keywords)
        return call

    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    main()
"""


class Killable:
    """A short run on a tiny model, in processes of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny_files.write_model(folder / "model")
        tiny_files.write_rows(folder / "rows.jsonl")
        (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
        (folder / "run.toml").write_text(
            'model = "./model"\n[data]\nfile = "rows.jsonl"\neval_file = "rows.jsonl"\n'
            "[train]\nsteps = 60\nbatch = 4\nlr = 0.01\nsave_every = 1\neval_every = 20\n[lora]\ndropout = 0.1\n"
        )

    def start(self, out: str, die_at: int = 0) -> subprocess.Popen:
        command = [sys.executable, "driver.py", str(die_at), "train", "run.toml", "--out", out, "--resume"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(self, out: str) -> dict[str, np.ndarray]:
        process = self.start(out)
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
        return read_safetensors(self.folder / out / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_inside_the_writing_of_checkpoints_ends_with_the_same_bits(tmp_path):
    runs = Killable(tmp_path)
    started = time.perf_counter()
    expected = runs.finish("whole")
    seconds = time.perf_counter() - started
    rng = random.Random(0)
    for _ in range(8):  # at random moments
        process = runs.start("cut")
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * min(seconds, 3.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    for die_at in range(1, 21):  # inside the writing of a file
        process = runs.start("cut-in-files", die_at)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for out in ("cut", "cut-in-files"):
        found = runs.finish(out)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in lines if '"loss"' in line]
        assert len(steps) == 60
