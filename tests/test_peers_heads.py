"""Heads against transformers and PEFT in float64: what they say, losses, all gradients, files in both directions."""

import contextlib
import json
import warnings

import numpy as np
import pytest
import tiny
from test_encoder import rows
from test_heads import CONFIGS, ENCODERS, HEADED, LABELS, asked, merged, write_base

import refpeft
from refpeft import adapters, files, sites
from refpeft.models import saving
from refpeft.models.checkpoint import open_checkpoint
from refpeft.quant import make_quantizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from torch_float64 import Float64, compute_in_float64  # noqa: E402

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


# ---- adapters --------------------------------------------------------------------------------------------------------

TYPES = {"classify": "SEQ_CLS", "regress": "SEQ_CLS", "tag": "TOKEN_CLS"}
QV = {
    "distilbert": ["q_lin", "v_lin"],
    "deberta-v3": ["query_proj", "value_proj"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}
LAST = {"distilbert": ["lin2"], "albert": ["ffn_output"], "llama": ["down_proj"], "gpt2": ["mlp.c_proj"]}
NORMS = {
    "distilbert": ["output_layer_norm"],
    "albert": ["full_layer_layer_norm"],
    "llama": ["input_layernorm"],
    "gpt2": ["ln_1"],
}


def q_and_v(family: str) -> list[str]:
    return QV.get(family, ["query", "value"])


def last(family: str) -> list[str]:
    return LAST.get(family, ["output.dense"])


THEIRS = {
    "lora": lambda f: peft.LoraConfig(r=2, target_modules=q_and_v(f)),
    "lora-all-linear": lambda f: peft.LoraConfig(r=2, target_modules="all-linear"),
    "lora-saved": lambda f: peft.LoraConfig(r=2, target_modules=q_and_v(f), modules_to_save=["pooler"]),
    "lora-bias": lambda f: peft.LoraConfig(r=2, target_modules=q_and_v(f), bias="all"),
    "dora": lambda f: peft.LoraConfig(r=2, target_modules=q_and_v(f), use_dora=True),
    "ia3": lambda f: peft.IA3Config(target_modules=[*q_and_v(f), *last(f)], feedforward_modules=last(f)),
    "adalora": lambda f: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=q_and_v(f)),
    "vera": lambda f: peft.VeraConfig(r=3, target_modules=q_and_v(f)),
    "oft": lambda f: peft.OFTConfig(oft_block_size=6, target_modules=q_and_v(f)),
    "ln_tuning": lambda f: peft.LNTuningConfig(target_modules=NORMS.get(f, ["LayerNorm"])),
    "prompt_tuning": lambda f: peft.PromptTuningConfig(num_virtual_tokens=3, **sizes(f)),
    "p_tuning": lambda f: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **sizes(f)),
    "prefix_tuning": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=3, **sizes(f)),
}
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")


def sizes(family: str) -> dict[str, int]:
    """What PEFT does not find in every config."""
    return {"token_dim": 24, "num_layers": 2, "num_attention_heads": 4} if family == "distilbert" else {}


def unequal_lengths(family: str, name: str) -> dict[str, np.ndarray]:
    """Rows, with padding but where PEFT's head then reads padding: that of a decoder behind rows without ids."""
    return rows(family, padded=family in ENCODERS or name == "prefix_tuning" or name not in PROMPTS)


def cannot(name: str, family: str, task: str) -> bool:
    """What PEFT fails at, and LoRA's biases where there are none."""
    if name == "prefix_tuning":
        return family in ("distilbert", "deberta-v3", "albert")  # which take no keys and values of before
    if name in PROMPTS:
        return family == "albert"  # whose embeddings are not as wide as its states
    if name == "lora-all-linear":
        return task == "tag" or family == "distilbert"  # whose classifier it wraps twice
    if name == "lora-saved":
        return (family, task) != ("bert", "classify")
    return (name, family) in (("oft", "gpt2"), ("lora-bias", "llama"))


FAMILIES = ["bert", "roberta", "distilbert", "deberta-v3", "albert", "llama", "gpt2"]
CASES = [
    (name, family, task)
    for name in THEIRS
    for family in FAMILIES
    for task in (("classify", "tag") if family in ENCODERS else ("classify",))
    if not cannot(name, family, task)
]
CASES.append(("lora", "roberta", "regress"))


@pytest.mark.parametrize(("name", "family", "task"), CASES)
def test_an_adapter_of_peft_with_its_head_gives_the_same_logits_here(name, family, task, tmp_path):
    """Loaded by the two paths alone: task and labels come from the adapter."""
    config = THEIRS[name](family)
    config.task_type = TYPES[task]
    theirs = scrambled(peft.get_peft_model(peer(family, task, tmp_path / "base"), config))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = refpeft.load(tmp_path / "base", tmp_path / "adapter", dtype="float64")
    assert (ours.task, ours.labels) == (task, () if task == "regress" else LABELS)
    assert_same_logits(ours, theirs, unequal_lengths(family, name))


def assert_same_logits(ours, theirs, given) -> None:
    said, want = ours(**given).data, says(theirs, given).detach().numpy()
    want = want[:, -said.shape[1] :] if said.ndim == 3 else want  # tags of rows before the text are left out
    counts = given["segments"] >= 0 if said.ndim == 3 else slice(None)
    assert error(said[counts], want[counts]) < LIMIT


OURS = {
    "lora": {"r": 2},
    "lora-saved": {"r": 2, "modules_to_save": ("@embed", "bert.embeddings.LayerNorm")},
    "lora-bias": {"r": 2, "bias": "all"},
    "lora-all-linear": {"r": 2, "targets": "all-linear"},
    "dora": {"r": 2},
    "ia3": {},
    "adalora": {"init_r": 3, "target_r": 2, "targets": ["@q", "@v"]},
    "vera": {"r": 3},
    "oft": {"block_size": 6},
    "ln_tuning": {},
    "prompt_tuning": {"tokens": 3},
    "p_tuning": {"tokens": 3, "encoder": "none"},
    "prefix_tuning": {"tokens": 3},
}


@pytest.mark.parametrize(("name", "family", "task"), [*CASES, ("lora", "bert", "mlm"), ("ia3", "roberta", "mlm")])
def test_an_adapter_of_ours_with_its_head_gives_the_same_logits_in_peft(name, family, task, tmp_path):
    """On a base whose files have no head at all, so that all of it is in the adapter."""
    labels = LABELS if task in ("classify", "tag") else ()
    base = write_base(tmp_path / "base", family, pad_token_id=1)
    ours = refpeft.load(base, dtype="float64", task=task, labels=labels)
    reads = {"head_reads": "prompt"} if name in ("prompt_tuning", "p_tuning") and ours.read == "first" else {}
    adapter = sites.attach(ours, name.partition("-")[0], OURS[name] | reads)
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")  # PEFT holds prompts in float32 when it loads them
    adapters.save(tmp_path / "adapter", ours)
    assert files.read_json(tmp_path / "adapter" / "adapter_config.json")["peft_type"] != "REFPEFT"
    count = {} if task == "mlm" else {"num_labels": len(labels) or 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected) .*keys.*")
        theirs = CLASSES[task].from_pretrained(base, dtype=torch.float64, **count)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").double().eval()
    assert_same_logits(ours, theirs, unequal_lengths(family, name))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_adapter_for_vectors_is_one_of_the_bare_model_in_peft(family, tmp_path):
    base = write_base(tmp_path / "base", family)
    ours = refpeft.load(base, dtype="float64", task="embed")
    tiny.scramble(sites.attach(ours, "lora", {"r": 2}))
    adapters.save(tmp_path / "adapter", ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected) .*keys.*")
        theirs = transformers.AutoModel.from_pretrained(base, dtype=torch.float64)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").double().eval()
    given = rows(family)
    real = torch.tensor(given["segments"] >= 0)
    hidden = theirs(
        input_ids=torch.tensor(given["ids"]).long(),
        attention_mask=real.long(),
        **({"token_type_ids": torch.tensor(given["types"])} if "types" in given else {}),
    ).last_hidden_state
    mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    want = torch.nn.functional.normalize(mean).detach().numpy()
    assert error(ours(**given).data, want) < 1e-6  # the file has float32


def scrambled(model):
    """Moves what PEFT trains away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranknum" in name:  # of AdaLoRA, a constant that no file has
                parameter.requires_grad = False
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()
