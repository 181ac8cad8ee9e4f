"""The plan of a run tells, without reading a weight, what the run would then do and hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_files

import refpeft
from refpeft import config, cost, doctor, fused, inputs, memory, plan, report, run
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.data import load_data
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.models.checkpoint import Checkpoint, open_checkpoint
from refpeft.optim import OPTIMIZERS, Flat
from refpeft.trainer import Trainer


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """A checked configuration on a tiny model and twelve rows."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")

    def resolve(*sets: str, method: str | list = "lora") -> config.Resolved:
        flags = [("--model", "model", "./model"), ("--data", "data.file", "rows.jsonl"), ("--method", "method", method)]
        return config.resolve(None, flags, sets)

    return resolve


def test_it_counts_what_the_loaded_model_has(resolve):
    resolved = resolve("lora.r=2")
    made = plan.plan(resolved)
    model = refpeft.load("model")
    adapter = refpeft.attach(model, "lora", resolved.options["lora"])
    assert made.parameters == model.parameters()
    assert made.trained == adapter.size
    assert made.methods == {"lora": {"q_proj": 2, "v_proj": 2}}
    assert made.directory == "runs/model-lora"


def test_no_weight_is_read(resolve, monkeypatch):
    def tensor(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    assert plan.plan(resolve(method=["lora", "full"])).trained > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_weights_take_as_much_as_was_planned(resolve, dtype, quantizer):
    sets = [f"dtype={dtype}"] + ([f"quantizer={quantizer}"] if quantizer else [])
    planned = plan.plan(resolve(*sets)).memory["weights"]
    assert planned == pytest.approx(refpeft.load("model", dtype=dtype, quantizer=quantizer).nbytes, rel=0.05)


def test_what_a_method_keeps_in_training_counts_beside_the_optimizers_state(resolve):
    made = plan.plan(resolve("adalora.init_r=3", "adalora.target_r=1", method="adalora"))
    assert made.memory["optimizer (adamw), and what methods keep"] == (2 + 2) * made.trained * 4
    assert plan.plan(resolve()).memory["optimizer (adamw)"] > 0


@pytest.mark.parametrize("method", ["lora", "full", "ia3", "prefix_tuning"])
def test_activations_take_as_much_as_was_planned(resolve, method):
    made = plan.plan(resolve("train.batch=4", "dtype=float64", method=method))
    planned = next(count for part, count in made.memory.items() if part.startswith("activations of 4 x "))
    model = refpeft.load("model", dtype="float64")  # no longer views of the file, whose bytes would count
    refpeft.attach(model, method)
    examples = load_data("rows.jsonl", model.tokenizer).examples
    longest = sorted(examples, key=len)[-4:]
    for example in longest:
        example.supervised[:] = True  # the plan takes every token to be learned
    assert planned == pytest.approx(
        cost.tape_bytes(model, Example.collate([[example] for example in longest])), rel=0.1
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_takes_as_much_as_was_planned(resolve, optimizer):
    flat = Flat(refpeft.attach(refpeft.load("model"), "lora").params.items())
    state = sum(array.nbytes for array in OPTIMIZERS[optimizer](flat).state.values())
    assert plan.plan(resolve(f"train.optimizer={optimizer}")).memory[f"optimizer ({optimizer})"] == state
    paged = plan.plan(resolve(f"train.optimizer={optimizer}", "train.paged=true")).memory
    assert paged[f"optimizer ({optimizer}, {report.size(state)} paged)"] <= state


def test_recomputed_activations_take_less(resolve):
    kept, recomputed = (
        sum(plan.plan(resolve(f"train.checkpoint_activations={on}")).memory.values()) for on in ("false", "true")
    )
    assert recomputed < kept


@pytest.mark.parametrize(
    ("sets", "steps", "formula"),
    [
        ([], 2, "1 epochs of 2 batches of 8; learning rate 0.0002, cosine, warm-up 1"),
        (["train.epochs=2.5", "train.batch=4"], 8, "2.5 epochs of 3 batches of 4"),
        (
            ["train.steps=7", "train.warmup=3", "train.schedule=linear"],
            7,
            "train.steps; learning rate 0.0002, linear, warm-up 3",
        ),
    ],
)
def test_steps_come_with_their_formula(resolve, sets, steps, formula):
    made = plan.plan(resolve(*sets))
    assert made.steps == steps
    assert made.formula.startswith(formula)


def test_its_text_has_all_parts_and_the_origin_of_what_was_given(resolve):
    text = plan.plan(resolve("lora.r=2", "data.eval_share=0.25")).text()
    for part in (
        "model    ./model: llama, 2 layers of 24",
        "method   lora at 2 q_proj, 2 v_proj",
        "trained  ",
        "steps    2 = ",
    ):
        assert part in text
    for part in (
        "data     rows.jsonl: 9 rows, format prompt",
        "weights: linear layers, 32 bits a number",
        "optimizer",
        "in all",
        "adapter_model.safetensors",
    ):
        assert part in text
    assert "  lora.r = 2  (--set lora.r)\n" in text


def test_as_json_it_has_the_same(resolve):
    made = plan.plan(resolve())
    read = json.loads(json.dumps(made.as_dict()))
    assert read["steps"] == made.steps
    assert read["memory"] == made.memory


def test_too_little_memory_is_said_with_what_helps(resolve, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    made = plan.plan(resolve())
    assert "is more than the 1000 B that are free" in made.notes[0]
    assert "more than" in made.text()


@pytest.mark.parametrize("free, said", [(None, False), (1000, True), (2**29, False), (2**40, False)])
def test_a_run_says_before_it_loads_that_a_gpus_memory_will_not_suffice(resolve, monkeypatch, free, said):
    """Where nothing is known of it, or much is free, it is not worked out; between these it is compared."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    resolved = resolve("device=cuda", "dtype=bfloat16")
    checkpoint = open_checkpoint(Path(resolved.run.model))
    read = inputs.read(resolved.run, checkpoint.config, checkpoint.tokenizer())
    found = plan.shortage(resolved, checkpoint, read)
    assert (found is not None) == said
    if said:
        foreseen = report.size(sum(plan.plan(resolved).memory.values()))
        assert found.startswith(f"memory may not suffice: {foreseen} are foreseen, {report.size(free)} are free (")
        assert "weights " in found and "optimizer (adamw) " in found
        assert "\n" not in found and re.search(r"\)\. What helps: .*train\.checkpoint_activations=true", found)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert plan.shortage(resolve(), checkpoint, read) is None  # the host's is not asked about


def test_what_a_run_says_of_short_memory_comes_before_the_weights_are_read(resolve, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(plan, "shortage", lambda *_: "memory may not suffice")
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"said before were {said}"))
    with pytest.raises(pytest.fail.Exception, match="memory may not suffice"):
        run.train(resolve(), tmp_path / "out", say=said.append)


def test_memory_that_a_step_does_not_find_is_told_with_what_took_it(monkeypatch):
    model = tiny.model("llama", "float32")
    refpeft.attach(model, "lora")
    trainer = Trainer(model, Batches([Example(np.arange(9), np.ones(9, bool), 1)] * 4, 4, 9), None, Train(steps=1))

    def short(*_):
        raise MemoryError("Unable to allocate 9 GiB for an array.")

    monkeypatch.setattr(model, "objective", short)
    with pytest.raises(RefpeftError) as told:
        trainer.run()
    said = str(told.value)
    assert said.startswith("out of memory: Unable to allocate 9 GiB for an array; ")
    assert re.search(r"Taken were: activations and working arrays, with Python and its libraries [\d.]+ [MG]iB, ", said)
    assert ", optimizer, values and gradients " in said and ", weights " in said
    assert "What helps: --set train.checkpoint_activations=true" in said  # what helps with the largest part


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def shape(*sets: str, rows: int = 4, length: int = 2048) -> plan.ShapePlan:
    """Llama-3-8B under LoRA, planned for a GPU in bfloat16."""
    tables = {"data.length": length, "train.batch": rows, "lora.targets": "all-linear", "lora.r": 16}
    tables |= {"model": "llama-3-8b", "data.file": config.EMBEDDED, "device": "cuda", "dtype": "bfloat16"}
    return plan.plan_shape(config.resolve(None, [("test", key, value) for key, value in tables.items()], sets))


def part(made: plan.ShapePlan, begin: str) -> int:
    return next(count for name, count in made.memory.items() if name.startswith(begin))


def test_on_a_gpu_a_layer_keeps_two_bytes_a_number_and_no_outputs_that_are_made_again():
    """Of a token: the inputs of both norms, q, k, v and what attention gives, gate and up, and u of seven factors."""
    dim, ff, kv, layers, tokens = 4096, 14336, 1024, 32, 4 * 2048
    numbers = 2 * dim + (dim + 2 * kv + dim) + 2 * ff + 7 * 16
    expected = 2 * layers * tokens * numbers
    assert part(shape(), "activations") == pytest.approx(expected, rel=0.01)


def test_what_a_gpu_is_told_to_compute_again_is_kept_as_inputs_of_layers():
    """And that of the last norm, and the gradient of what it gives."""
    inputs = 2 * (32 + 2) * 2048 * 4096
    assert part(shape("train.checkpoint_activations=true", rows=1), "activations") == pytest.approx(inputs, rel=0.01)


def test_what_is_offloaded_is_not_on_the_gpu(resolve, monkeypatch):
    """Of 32 layers' inputs two are there, that of the last norm, and the gradient of what it gives."""
    again = "train.checkpoint_activations=true"
    plans = [shape(again, f"train.offload_activations={on}", rows=1) for on in ("false", "true")]
    there, away = (part(made, "activations") for made in plans)
    assert away == pytest.approx(2 * (2 + 2) * 2048 * 4096, rel=0.05)
    assert there - away == 2 * 30 * 2048 * 4096
    tiny_files.write_model(Path("model"), num_hidden_layers=5)
    monkeypatch.setattr(doctor, "obstacle", lambda: "there is no GPU: buy one")
    made = plan.plan(resolve("device=cuda", again, "train.offload_activations=true"))
    assert made.notes[1].endswith(" of activations lie in the host's memory, pinned")


def test_a_layer_that_is_computed_again_takes_the_place_of_the_logits():
    """Of 8 rows of 2,048 tokens one layer keeps more than logits take, and needs as much again to compute with."""
    again, kept = (shape(f"train.checkpoint_activations={on}", rows=8) for on in ("true", "false"))
    layer = kept.activations.layer
    assert layer > part(again, "logits")
    assert part(again, "other") - part(kept, "other") == pytest.approx(layer, rel=0.01)


def test_float32_on_a_gpu_keeps_what_the_host_does():
    gpu, host = (shape("dtype=float32", f"device={device}") for device in ("cuda", "cpu"))
    assert part(gpu, "activations") == part(host, "activations") > 2 * part(shape(), "activations")


def test_tf32_takes_what_float32_does():
    exact, fast = (shape(f"dtype={dtype}") for dtype in ("float32", "tf32"))
    assert fast.memory == exact.memory and fast.frozen == exact.frozen


def test_logits_and_dense_weights_of_a_gpu_are_bounded():
    made = shape()
    assert part(made, "logits") == fused.LOGITS_ON_GPU
    one_dense, factors = 2 * 4096 * 14336, 2 * made.trained  # which lie beside the weights, where these are dense
    assert part(shape("quantizer='nf4'"), "other") - part(made, "other") == one_dense - factors


def test_plans_know_which_pairs_make_outputs_again_and_what_lies_behind_rows():
    folder = Path(refpeft.__file__).parent / "cuda"
    found = {
        name for file in folder.glob("*.py") for name in re.findall(r"^@(\w+)\.recomputed", file.read_text(), re.M)
    }
    assert found == {op.name for op in cost.MADE_AGAIN}
    assert f"\nMARGIN = {cost.MARGIN}\n" in (folder / "margins.py").read_text()


def test_a_run_for_a_gpu_is_planned_where_there_is_none(resolve, monkeypatch):
    monkeypatch.setattr(doctor, "obstacle", lambda: "there is no GPU: buy one")
    made = plan.plan(resolve("device=cuda", "dtype=bfloat16"))
    assert made.free is None and made.notes == ["here device 'cuda' cannot be used: there is no GPU: buy one"]
    assert "Python and its libraries" not in made.memory  # which take the host's


def test_wrong_targets_and_a_taken_directory_are_refused_as_in_training(resolve, tmp_path):
    with pytest.raises(RefpeftError, match="'q_prj' matches no site of this model; did you mean 'q_proj'"):
        plan.plan(resolve('lora.targets=["q_prj"]'))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    with pytest.raises(RefpeftError, match="old already holds a run"):
        plan.plan(resolve("out=old"))
    with pytest.raises(RefpeftError, match=r"length is 1,000, but the model was made for 64 positions"):
        plan.plan(resolve("data.length=1000"))


def test_some_memory_is_free():
    free = memory.free_memory("cpu")
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("method, times", [("lt_sft", 5), ("fish_mask", 7)])
def test_a_look_at_the_data_counts_where_it_takes_more_than_a_step(resolve, method, times):
    """A copy of the targets, its gradients, and what is made of these: changes of weights need two moments, too."""
    made = plan.plan(resolve("train.batch=1", method=method)).memory
    linear = [site for site in refpeft.load("model").sites.values() if site.kind == "linear" and site.index is not None]
    looked = 4 * times * sum(site.shape[0] * site.shape[1] for site in linear)
    more = made["more while methods look at the data first"]
    assert more == looked - made["gradients"] - made["optimizer (adamw)"]
