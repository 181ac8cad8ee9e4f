"""The GPU computes what the host computes: every op, whole models under every method, quantized weights, training."""

import json

import cupy
import numpy as np
import pytest
import test_t5
import tiny
import tiny_files
from cases import FUSED, OPS, Case, Place
from click.testing import CliRunner
from variants import TO_FIT, needed_quantizer

import refpeft
from refpeft import adapters, fused, manager, sites
from refpeft.backend import bfloat16, module, to_host
from refpeft.batches import Batch, Batches
from refpeft.cli import main
from refpeft.config import Train
from refpeft.examples import Example
from refpeft.generate import generate
from refpeft.models.base import Model
from refpeft.quant import Dense, Quantizer, make_quantizer
from refpeft.rng import Stream
from refpeft.special import erf
from refpeft.tensor import Tensor, parameter
from refpeft.trainer import Trainer

METHODS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "method")
OPTIONS = TO_FIT | {"lora": {"dropout": 0.2}, "bitfit": {"create": True}}


def far(got, expected) -> float:
    """The distance in units of eps(dtype) of the largest expected value."""
    got, expected = to_host(got), np.asarray(to_host(expected))
    assert got.shape == expected.shape
    unit = np.finfo(got.dtype).eps * max(float(np.abs(expected).max(initial=0)), 1e-30)
    return float(np.abs(got.astype("f8") - expected).max(initial=0) / unit)


def test_the_device_cuda_is_cupy():
    assert module("cuda") is cupy


# ---- ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("case", OPS + FUSED, ids=str)
def test_an_op_has_the_values_and_gradients_of_the_host(case: Case, dtype: str):
    results = []
    for place in (Place("f8"), Place(dtype, cupy)):
        leaves = [parameter(array) for array in case.arrays(place)]
        out = case(*leaves, place=place)
        out.backward(place(np.cos(np.arange(out.data.size, dtype="f8")).reshape(out.shape)))
        results.append([out.data, *(leaf.grad for leaf in leaves)])
    for host, there in zip(*results, strict=True):
        assert isinstance(there, cupy.ndarray) and there.dtype == dtype
        assert far(there, host) <= 256


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_over_several_blocks(dtype: str, window: int | None):
    time, rng = 600, np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, time, 16)) for heads in (4, 2, 2))
    segments = np.stack([np.repeat([0, 1, -1], [250, 330, 20]), np.zeros(time, int)])
    results = []
    for place in (Place("f8"), Place(dtype, cupy)):
        leaves = [parameter(place(array)) for array in (q, k, v)]
        y = fused.attention(*leaves, mask=fused.Mask(time, window, place(segments)))
        y.backward()
        results.append([y.data, *(leaf.grad for leaf in leaves)])
    for host, there in zip(*results, strict=True):
        assert far(there, host) <= 1024  # sums over 600 keys


def test_constants_of_every_kind_are_taken():
    x = Tensor(cupy.ones((2, 3), "f4"))
    for constant in (2, 2.5, np.float32(2.5), np.float64(2.5), np.full(3, 2.5), cupy.full(3, 2.5)):
        for y in (x + constant, constant * x, constant - x, x / constant):
            assert isinstance(y.data, cupy.ndarray) and y.dtype == np.float32


def test_erf_is_the_hosts():
    x = np.concatenate((np.linspace(-7, 7, 5001), [0.46875, 4.0, -np.inf, np.inf]))
    for dtype in ("f4", "f8"):
        assert far(erf(cupy.asarray(x.astype(dtype))), erf(x.astype(dtype))) <= 4


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_random_bits_are_the_hosts():
    here, there = Stream(2**40 + 1, "a"), Stream(2**40 + 1, "a", xp=cupy)
    for n in (7, 0, 100_003):
        assert np.array_equal(here.bits(n), to_host(there.bits(n)))
    assert np.array_equal(here.uniform(-1, 1, (3, 5)), to_host(there.uniform(-1, 1, (3, 5))))
    assert far(there.standard_normal(1000), here.standard_normal(1000)) <= 16
    assert np.array_equal(here.permutation(1000), to_host(there.permutation(1000)))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_dropout_is_the_hosts_bit_for_bit(dtype: str):
    x = np.random.default_rng(0).standard_normal((33, 77)).astype(dtype)
    results = []
    for xp in (np, cupy):
        leaf = parameter(xp.asarray(x))
        out = fused.dropout(leaf, rate=0.3, stream=Stream(1, "mask", xp=xp))
        out.backward()
        results.append([to_host(a) for a in (out.data, leaf.grad)])
    assert all(np.array_equal(here, there) for here, there in zip(*results, strict=True))


# ---- weights ---------------------------------------------------------------------------------------------------------


def nf4(double_quant: bool = True) -> Quantizer:
    return make_quantizer("nf4", None, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_packs_and_unpacks_to_the_hosts_bits(double_quant: bool):
    weight = np.random.default_rng(0).standard_normal((65, 67)).astype("f4")
    weight[:4] = 0  # whole blocks of zeros
    quantizer = nf4(double_quant)
    here, there = (quantizer(xp.asarray(weight), np.dtype("f4")) for xp in (np, cupy))
    assert here.parts.keys() == there.parts.keys() and here.nbytes == there.nbytes
    for name in here.parts:
        assert np.array_equal(here.parts[name], to_host(there.parts[name])), name
    assert isinstance(there(), cupy.ndarray)
    assert np.array_equal(here(), to_host(there()))
    assert not there()[:3].any()


def test_bfloat16_weights_are_cast_to_the_hosts_values():
    array = np.random.default_rng(0).standard_normal((5, 7)).astype(bfloat16)
    here, there = (Dense(xp.asarray(array), np.dtype("f4")) for xp in (np, cupy))
    assert there().dtype == np.float32 and np.array_equal(here(), to_host(there()))
    ids = np.array([[3, 0], [3, 4]])
    assert np.array_equal(here.rows(ids, np.dtype("f4")), to_host(there.rows(cupy.asarray(ids), np.dtype("f4"))))


# ---- models ----------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    """One row with padding, one of two documents."""
    plain = tiny.batch()
    segments = np.array([[0] * 6 + [-1] * 3, [0] * 4 + [1] * 5], "i4")
    positions = np.array([[*range(6), 0, 0, 0], [*range(4), *range(5)]], "i4")
    return Batch(plain.ids, np.where(segments < 0, -100, plain.targets), positions, segments)


def pair(name: str, methods: list[str], dtype: str = "float64", quantizer: Quantizer | None = None) -> list[Model]:
    """The same model on the host and on the GPU, its adapters' values random and the same."""
    quantizer = quantizer or needed_quantizer(methods[0])
    models = [tiny.model(name, dtype, quantizer, xp=xp) for xp in (np, cupy)]
    for method in methods:
        for model in models:
            sites.attach(model, method, OPTIONS.get(method))
        tiny.scramble(models[0].adapters[-1])
    for (_, here), (_, there) in zip(*(model.trained() for model in models), strict=True):
        there.data = cupy.asarray(here.data)
    return models


def step(model: Model) -> dict:
    """Loss and gradients of a training step, by name; none of what the step leaves out."""
    model.mode.training = True
    loss = model.loss(batch())
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in model.trained() if tensor.grad is not None}
    assert gradients
    return {"loss": loss.data} | gradients


def check(models: list[Model], limit: float) -> None:
    here, there = map(step, models)
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert isinstance(there[name], cupy.ndarray)
        assert far(there[name], value) <= limit, name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_loss_and_gradients_of_the_host(name: str, method: str):
    check(pair(name, [method]), 2**16)


def test_methods_together_and_recomputation():
    models = pair("qwen2", ["lora", "prefix_tuning", "prompt_tuning"])
    for model in models:
        model.checkpointing = True
    check(models, 2**16)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_in_float32_too_and_on_quantized_weights(quantizer: str | None):
    check(pair("llama", ["lora"], "float32", nf4() if quantizer else None), 4096)


def test_loftq_is_fitted_to_the_weights_of_the_host_and_its_files_are_read_on_both(tmp_path):
    models = [tiny.model("llama", "float32", nf4(), xp=xp) for xp in (np, cupy)]
    here, there = (sites.attach(model, "loftq", {"r": 3}) for model in models)
    for ours, theirs in zip(here.layers, there.layers, strict=True):
        assert isinstance(theirs.site.weight.parts["packed"], cupy.ndarray)
        assert np.array_equal(to_host(theirs.site.weight.parts["packed"]), ours.site.weight.parts["packed"])
        assert far(theirs.p.B.data @ theirs.p.A.data, ours.p.B.data @ ours.p.A.data) <= 64
    adapters.save(tmp_path, models[1], quantizer=nf4(False))
    for xp in (np, cupy):
        model = tiny.model("llama", "float32", nf4(), xp=xp)
        adapters.load(model, tmp_path)
        adapters.quantize(models[1], nf4(False))
        assert far(model(tiny.ids()).data, models[1](tiny.ids()).data) <= 4096


@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_a_merged_model_is_the_model_with_its_adapter(method: str):
    model, ids = pair("llama", [method])[1], tiny.ids()
    before = model(ids).data
    sites.merge(model)
    assert far(model(ids).data, before) <= 4096


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_writes_the_tokens_that_the_host_writes(name: str):
    prompts = [tiny.ids(1, n)[0].tolist() for n in (7, 3)]
    drawn, beams = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}, {"beams": 3, "no_repeat_ngram": 2}
    for options in ({}, drawn, beams):
        here, there = (generate(model, prompts, 12, **options) for model in pair(name, ["prefix_tuning"]))
        assert here == there


def test_t5_writes_the_tokens_that_the_host_writes():
    prompts = [tiny.ids(1, n)[0].tolist() for n in (7, 3)]
    for options in ({}, {"beams": 3}):
        here, there = (generate(tiny.of(test_t5.CONFIGS["flan"], xp=xp), prompts, 12, **options) for xp in (np, cupy))
        assert here == there


def test_a_directory_is_loaded_onto_the_gpu(tmp_path):
    directory = tiny_files.write_model(tmp_path / "model")
    ids = tiny.ids()
    in_bfloat16 = 4 * 2**16  # 4 of its eps
    for dtype, limit in (("float64", 4096), ("float32", 4096), ("bfloat16", in_bfloat16)):
        here, there = (refpeft.load(directory, dtype=dtype, device=device) for device in ("cpu", "cuda"))
        assert far(there(ids).data, here(ids).data) <= limit
    assert refpeft.load(directory, quantizer="nf4", device="cuda")(ids).data.dtype == np.float32


# ---- training --------------------------------------------------------------------------------------------------------


def examples(count: int = 16) -> list[Example]:
    """Rows of different lengths whose second half is learned."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40, n).astype("i4") for n in rng.integers(6, 14, count)]
    return [Example(ids, np.arange(len(ids)) >= len(ids) // 2, line) for line, ids in enumerate(rows, 1)]


def train(model: Model, out, steps: int = 8, resume: bool = False) -> list[float]:
    settings = Train(steps=steps, batch=4, micro_batch=2, lr=1e-2, save_every=4, checkpoint_activations=True)
    rows = Batches(examples(), batch=4, length=16, pack=True, seed=1)
    trainer = Trainer(model, rows, rows, settings, out, seed=1)
    return trainer.run(resume=resume).train_losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_has_the_losses_of_the_host(name: str, tmp_path):
    here, there = (train(model, tmp_path / str(i)) for i, model in enumerate(pair(name, ["lora"])))
    assert len(here) == 8 and here[-1] < here[0]
    assert np.allclose(here, there, rtol=1e-7, atol=0)


def test_the_same_seed_gives_the_same_bits_and_resuming_continues_them(tmp_path):
    def values(model: Model) -> dict[str, np.ndarray]:
        return {name: to_host(tensor.data) for name, tensor in model.trained()}

    def fresh() -> Model:
        model = tiny.model("llama", "float32", xp=cupy)
        sites.attach(model, "lora", {"dropout": 0.2})
        return model

    first, second, third = fresh(), fresh(), fresh()
    train(first, tmp_path / "a")
    train(second, tmp_path / "b")
    for checkpoint in (tmp_path / "b" / "checkpoints").glob("step-*8"):  # as if it had been stopped after four steps
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    train(third, tmp_path / "b", resume=True)
    for name, value in values(first).items():
        assert np.array_equal(value, values(second)[name]) and np.array_equal(value, values(third)[name])


def test_the_commands_take_the_device(tmp_path):
    model, rows = tiny_files.write_model(tmp_path / "model"), tiny_files.write_rows(tmp_path / "rows.jsonl")
    common = ["--model", model, "--data", rows, "--device", "cuda"]
    out = tmp_path / "out"

    def run(*arguments) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    train = ["train", *common, "--eval-data", rows, "--steps", "4", "--batch", "4", "--lr", "0.01"]
    assert "lora" in run(*train, "--method", "lora", "--quantizer", "nf4", "--dry-run")
    run(*train, "--method", "lora", "--method", "prefix_tuning", "--quantizer", "nf4", "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert held_out[-1] < held_out[0]
    assert "loss" in run("eval", *common, "--adapter", out)
    run("generate", "--model", model, "--adapter", out, "--device", "cuda", "is 3 even?")
