"""Heads against transformers and PEFT in float64: what they say, losses, all gradients, files in both directions."""

import contextlib
import json

import numpy as np
import pytest
from test_encoder import rows
from test_heads import CONFIGS, HEADED, LABELS, asked, merged

import refpeft
from refpeft import sites
from refpeft.models import saving
from refpeft.models.checkpoint import open_checkpoint
from refpeft.quant import make_quantizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peers import Float64, compute_in_float64  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-10
CLASSES = {
    "classify": transformers.AutoModelForSequenceClassification,
    "regress": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
    "mlm": transformers.AutoModelForMaskedLM,
}

BIASES = {
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "lm_head.bias": "lm_head.decoder.bias",
    "predictions.bias": "predictions.decoder.bias",
}
"""Of masked language models: a bias that transformers has under two names."""


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    compute_in_float64(monkeypatch)


def write_tokenizer(folder) -> None:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


def peer(family: str, task: str, folder):
    """A random model of transformers in float64, which is also written to `folder` as a whole."""
    config = transformers.AutoConfig.for_model(**(CONFIGS[family] | {"pad_token_id": 1}))
    if task in ("classify", "tag"):
        config.id2label = dict(enumerate(LABELS))
    elif task == "regress":
        config.num_labels = 1
    torch.manual_seed(0)
    model = CLASSES[task].from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def says(model, given: dict[str, np.ndarray], exact: bool = True):
    options = {"token_type_ids": torch.tensor(given["types"])} if "types" in given else {}
    with Float64() if exact else contextlib.nullcontext():
        mask = torch.tensor((given["segments"] >= 0) * 1)
        return model(input_ids=torch.tensor(given["ids"]).long(), attention_mask=mask, **options).logits


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return abs(got - want).max() / abs(want).max()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "task"), [one for one in HEADED if one[1] != "embed"])
def test_what_a_head_says_its_loss_and_all_gradients_are_those_of_transformers(family, task, padded, tmp_path):
    theirs = peer(family, task, tmp_path)
    ours = refpeft.load(tmp_path, dtype="float64")
    assert (ours.task, ours.labels) == (task, LABELS if task in ("classify", "tag") else ())
    assert ours.checkpoint.unused == () and ours.new_head == ()
    given, batch = rows(family, padded), asked(family, task, padded=padded)
    said, want = ours(**given).data, says(theirs, given)
    counts = given["segments"] >= 0 if said.ndim == 3 else slice(None)
    assert error(said[counts], want.detach().numpy()[counts]) < LIMIT

    targets = torch.tensor(batch.targets[batch.targets > -100].reshape(-1) if task != "regress" else [0.5, -2.0])
    if task == "regress":
        loss = torch.nn.functional.mse_loss(want[:, 0], targets.double())
    else:
        asked_for = want[torch.tensor(batch.targets > -100)] if want.ndim == 3 else want
        loss = torch.nn.functional.cross_entropy(asked_for, targets.long())
    loss.backward()
    sites.attach(ours, "full")
    value = ours.loss(batch)
    assert float(value.data) == pytest.approx(loss.item(), rel=LIMIT)
    value.backward()
    tied = {one.name: one.tied for one in ours.sites.values() if one.tied}
    found = dict(ours.trained())
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    same = {f"{name}.weight": f"{other}.weight" for name, other in tied.items()} | BIASES
    expected = {same.get(name, name): gradient.numpy() for name, gradient in expected.items()}
    assert expected.keys() <= found.keys()
    for name, tensor in found.items():
        gradient = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        site = ours.sites[name.rpartition(".")[0]]
        gradient = gradient.T if site.transposed and gradient.ndim == 2 else gradient
        want = expected.get(name, np.zeros(gradient.shape)).reshape(gradient.shape)
        if site is ours.embed:  # torch leaves out the row of padding, which is not among ours
            gradient, want = gradient[2:], want[2:]
        assert abs(gradient - want).max() <= LIMIT * max(abs(want).max(), 1e-3), name


# ---- files -----------------------------------------------------------------------------------------------------------


def read_by_transformers(folder, task: str, **options):
    """The model in transformers, in float64, if it takes every tensor of the files and lacks none."""
    model, told = CLASSES[task].from_pretrained(folder, dtype=torch.float64, output_loading_info=True, **options)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.mark.parametrize(("family", "task"), [one for one in HEADED if one[1] != "embed"])
def test_transformers_reads_a_merged_model_with_its_head(family, task, tmp_path):
    folder = merged(tmp_path, family, task)
    theirs, given = read_by_transformers(folder, task), rows(family)
    want, said = says(theirs, given).detach().numpy(), refpeft.load(folder, dtype="float64")(**given).data
    counts = given["segments"] >= 0 if said.ndim == 3 else slice(None)
    assert error(said[counts], want[counts]) < LIMIT
    if task in ("classify", "tag"):
        assert theirs.config.id2label == dict(enumerate(LABELS))
    elif task == "regress":
        assert theirs.config.num_labels == 1 and theirs.config.problem_type == "regression"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v3"])
@pytest.mark.parametrize("task", ["classify", "mlm"])
def test_transformers_reads_a_quantized_model_with_its_head(family, task, tmp_path, monkeypatch):
    """Its head stays dense in both, also where bitsandbytes would quantize its dense layer.

    Rows are whole blocks: with AVX-512, bitsandbytes 0.50.2 decodes others wrongly.
    """
    pytest.importorskip("bitsandbytes")
    wide = {"dim": 64, "hidden_dim": 128} if family == "distilbert" else {"hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setitem(CONFIGS, family, CONFIGS[family] | wide)
    saving.quantize(
        open_checkpoint(merged(tmp_path, family, task)), tmp_path / "small", make_quantizer("nf4", None, False)
    )
    theirs, given = CLASSES[task].from_pretrained(tmp_path / "small", dtype=torch.float32).eval(), rows(family)
    want, said = says(theirs, given, exact=False).detach().numpy(), refpeft.load(tmp_path / "small")(**given).data
    assert error(said[0], want[0]) < 1e-5
