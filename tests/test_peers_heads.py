"""Heads against transformers and PEFT in float64: what they say, losses, all gradients, files in both directions."""

import json

import numpy as np
import pytest
from test_encoder import rows
from test_heads import CONFIGS, HEADED, LABELS, asked

import refpeft
from refpeft import sites

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


def says(model, given: dict[str, np.ndarray]):
    options = {"token_type_ids": torch.tensor(given["types"])} if "types" in given else {}
    with Float64():
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


BIASES = {
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "lm_head.bias": "lm_head.decoder.bias",
    "predictions.bias": "predictions.decoder.bias",
}
"""Of masked language models: a bias that transformers has under two names."""
