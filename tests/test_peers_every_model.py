"""Methods on bare encoders and on T5 against Hugging Face PEFT in float64, and adapter files in both directions."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import test_encoder
import test_t5
import tiny

from refpeft import adapters, ops, sites
from refpeft.errors import RefpeftError
from refpeft.models.base import Model
from refpeft.models.encoder_config import PREFIX

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import test_peers_peft  # noqa: E402
from torch_float64 import Float64, compute_in_float64  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
butterflies = test_peers_peft.butterflies
LIMIT = 1e-10

T5S = {name: test_t5.CONFIGS[name] | {"d_kv": 12} for name in ("t5", "flan")}
KINDS = {name: test_encoder.CONFIGS[name] for name in ("bert", "roberta", "distilbert", "deberta-v3")} | T5S
_OF_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
LINEAR = {
    "bert": _OF_BERT,
    "roberta": _OF_BERT,
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "deberta-v3": ["query_proj", "key_proj", "value_proj", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "flan": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
LAST = {"distilbert": ["lin2"], "t5": ["wo"], "flan": ["wo"]}  # of the feed-forward part
DEFAULT = {"distilbert": ["q_lin", "v_lin"]}  # where PEFT has none
NORMS = {"distilbert": ["sa_layer_norm", "output_layer_norm", "embeddings.LayerNorm"]}
NORMS |= {name: ["layer_norm", "final_layer_norm"] for name in T5S}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    compute_in_float64(monkeypatch)


def peer(kind: str):
    """The same model in transformers."""
    config = transformers.AutoConfig.for_model(**KINDS[kind])
    auto = transformers.AutoModelForSeq2SeqLM if kind in T5S else transformers.AutoModel
    model, prefix = auto.from_config(config).double().eval(), PREFIX.get(KINDS[kind]["model_type"], "")
    state = {name.removeprefix(prefix): torch.tensor(array) for name, array in tiny.drawn(KINDS[kind]).items()}
    if "lm_head.weight" in state:  # transformers 5 ties it all the same
        model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    return model


def rows(kind: str) -> dict[str, np.ndarray]:
    given = test_t5.rows() if kind in T5S else test_encoder.rows(kind)
    return {name: array for name, array in given.items() if name != "types"}  # PEFT leaves them out with prompts


def weight_of(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """What outputs are multiplied with before they are summed up: 0 at padding."""
    drawn = np.random.default_rng(2).standard_normal(shape)
    return drawn if kind in T5S else drawn * (rows(kind)["segments"] >= 0)[..., None]


def theirs_says(model, kind: str):
    given = rows(kind)
    more = {"decoder_input_ids": torch.tensor(given["said"])} if kind in T5S else {}
    mask = torch.tensor((given["segments"] >= 0) * 1)
    with Float64():
        out = model(input_ids=torch.tensor(given["ids"]).long(), attention_mask=mask, **more)
    return out.logits if kind in T5S else out.last_hidden_state[:, -mask.shape[1] :]


def apart(ours: np.ndarray, theirs, kind: str) -> float:
    real = weight_of(kind, ours.shape) != 0
    return abs(ours - theirs.detach().numpy())[real].max() / abs(ours[real]).max()


def names_in_files(parameters) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in parameters:
        if parameter.requires_grad and parameter.grad is not None:
            name = name.replace(".default", "").replace("_vector.weight", "_vector")
            found["prompt_embeddings" if name.startswith("prompt_encoder") else name] = parameter.grad.numpy()
    return found


def our_gradients(model: Model, kind: str) -> dict[str, np.ndarray]:
    out = model(**rows(kind))
    weight = weight_of(kind, out.shape)
    ops.sum(out * weight).backward()
    grads = {name: tensor.grad for name, tensor in model.trained()}
    (adapter,) = model.adapters
    entries, _ = adapters._written(adapter, model, None)
    once = [entry for entry in entries if grads.keys() >= set(entry.params)]  # no constants
    return {entry.name: entry.pack(*(grads[name] for name in entry.params)) for entry in once}


PEFTS = {
    "lora": lambda kind: peft.LoraConfig(r=4, lora_alpha=6, target_modules=DEFAULT.get(kind)),
    "lora-linear": lambda kind: peft.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR[kind], use_rslora=True),
    "dora": lambda kind: peft.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR[kind], use_dora=True),
    "adalora": lambda kind: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=9, target_modules=LINEAR[kind]
    ),
    "vera": lambda kind: peft.VeraConfig(r=4, target_modules=LINEAR[kind][:1]),
    "ia3": lambda kind: peft.IA3Config(
        target_modules=[*LINEAR[kind][1:3], *LAST.get(kind, ["output.dense"])],
        feedforward_modules=LAST.get(kind, ["output.dense"]),
    ),
    "ln_tuning": lambda kind: peft.LNTuningConfig(target_modules=NORMS.get(kind, ["LayerNorm"])),
    "prompt_tuning": lambda kind: peft.PromptTuningConfig(num_virtual_tokens=3),
    "oft": lambda kind: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR[kind]),
    "boft": lambda kind: peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=LINEAR[kind]),
    "prefix_tuning": lambda kind: peft.PrefixTuningConfig(num_virtual_tokens=3),
}
NETWORKS = {"p_tuning": lambda kind: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6)}
"""Those whose files have what a network gave, and not the network."""
NOT_THERE = [("prefix_tuning", kind) for kind in ("distilbert", "deberta-v3", *T5S)]
"""What transformers' encoders have no argument for; of T5 see below."""
PAIRS = [(name, kind) for name in PEFTS for kind in KINDS if (name, kind) not in NOT_THERE]


def of_peft(config, kind: str):
    task = "SEQ_2_SEQ_LM" if kind in T5S else "FEATURE_EXTRACTION"
    if config.is_prompt_learning and kind == "distilbert":  # whose config has other names for them
        config = dataclasses.replace(config, token_dim=24, num_layers=2, num_attention_heads=4)
    return peft.get_peft_model(peer(kind), dataclasses.replace(config, task_type=task))


def peft_adapter(name: str, kind: str, folder: Path):
    """A PEFT model with random values, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = test_peers_peft.scrambled(of_peft((PEFTS | NETWORKS)[name](kind), kind))
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_an_adapter_of_peft_gives_the_same_outputs_and_gradients_here(name, kind, tmp_path):
    theirs, ours = peft_adapter(name, kind, tmp_path), tiny.of(KINDS[kind])
    adapters.load(ours, tmp_path)
    want = theirs_says(theirs, kind)
    assert apart(ours(**rows(kind)).data, want, kind) < LIMIT

    (want * torch.tensor(weight_of(kind, tuple(want.shape)))).sum().backward()
    expected, got = names_in_files(theirs.named_parameters()), our_gradients(ours, kind)
    prefix = "base_model.model." + PREFIX.get(KINDS[kind]["model_type"], "")
    got = {key.replace(prefix, "base_model.model."): gradient for key, gradient in got.items()}
    if name == "prompt_tuning" and kind in T5S:  # PEFT has as many rows for the decoder, which it does not use
        assert not expected["prompt_embeddings"][3:].any()
        expected["prompt_embeddings"] = expected["prompt_embeddings"][:3]
    assert got.keys() == expected.keys()
    scale = max(abs(gradient).max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert abs(got[key] - gradient).max() < LIMIT * scale, key


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_network_of_peft_gave_gives_the_same_outputs_here(kind, tmp_path):
    theirs, ours = peft_adapter("p_tuning", kind, tmp_path), tiny.of(KINDS[kind])
    adapters.load(ours, tmp_path)
    assert apart(ours(**rows(kind)).data, theirs_says(theirs, kind), kind) < LIMIT


OURS = {
    "lora": {"r": 3, "alpha": 5.0},
    "lora-linear": {"targets": "all-linear", "rslora": True},
    "dora": {"r": 2, "targets": ["@q", "@down"]},
    "adalora": {"init_r": 4, "target_r": 3, "targets": ["@q", "@down"]},
    "vera": {"r": 5, "targets": ["@q", "@v"]},
    "ia3": {},
    "ln_tuning": {},
    "prompt_tuning": {"tokens": 4},
    "p_tuning": {"tokens": 4, "encoder": "mlp"},
    "prefix_tuning": {"tokens": 4},
    "p_tuning_v2": {"tokens": 4},
    "oft": {"block_size": 4},
    "boft": {"block_size": 2, "butterfly_factors": 2},
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in OURS for kind in KINDS])
def test_an_adapter_of_ours_gives_the_same_outputs_in_peft(name, kind, tmp_path):
    ours = tiny.of(KINDS[kind])
    adapter = sites.attach(ours, name.partition("-")[0], OURS[name])
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")  # PEFT holds prompts in float32 when it loads them
    adapters.save(tmp_path, ours)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    if name in ("prefix_tuning", "p_tuning_v2") and ("prefix_tuning", kind) in NOT_THERE:
        assert kept == "REFPEFT"
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected) .*keys.*")
        theirs = peft.PeftModel.from_pretrained(peer(kind), tmp_path).double().eval()
    limit = 1e-6 if name == "p_tuning" else LIMIT  # what a network gives is not rounded before
    assert apart(ours(**rows(kind)).data, theirs_says(theirs, kind), kind) < limit


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PEFT's prefixes are read for models with one stack of layers"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 1},
            "num_transformer_submodules = 2; for MULTITASK_PROMPT_TUNING refpeft knows 1",
        ),
    ],
)
def test_what_peft_gives_t5s_decoder_is_refused(config, message, tmp_path):
    """Its prefixes are in the decoder alone, where half of the layers have those of others and get a bias."""
    more = {"num_virtual_tokens": 3, "num_transformer_submodules": 2, "task_type": "SEQ_2_SEQ_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | more))
    test_encoder.save_file({"prompt_embeddings": np.zeros((6, 24), "f4")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RefpeftError, match=message):
        adapters.load(tiny.of(KINDS["t5"]), tmp_path)


# ---- bottlenecks, which PEFT has not ---------------------------------------------------------------------------------


def changed(values, place: str, h):
    inner = torch.relu(h @ values[f"{place}.down"].T + values[f"{place}.down_bias"])
    return inner @ values[f"{place}.up"].T + values[f"{place}.up_bias"]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "adapterdrop"])
def test_bottlenecks_in_bert_are_where_their_papers_have_them(method):
    """Houlsby's behind each part, before the residual and the norm; Pfeiffer's reads the normed sum, and is added to it
    before it is normed: transformers' modules and torch say the same."""
    ours, theirs = tiny.of(KINDS["bert"]), peer("bert")
    options = {"size": 5, "activation": "relu"} | ({"norms": False} if method == "houlsby" else {})
    adapter = sites.attach(ours, method, options)
    tiny.scramble(adapter)
    values = {name: torch.tensor(tensor.data, requires_grad=True) for name, tensor in adapter.params.items()}
    for i, layer in enumerate(theirs.encoder.layer):
        place = f"bert.encoder.layer.{i}"
        if method == "houlsby":
            for name, module in (("attn_out", layer.attention.output.dense), ("mlp_out", layer.output.dense)):
                at = f"{place}.{name}"
                module.register_forward_hook(lambda module, given, h, at=at: h + changed(values, at, h))
            continue

        def behind(norm, given, y, at=f"{place}.output.LayerNorm"):
            return torch.nn.functional.layer_norm(
                given[0] + changed(values, at, y), y.shape[-1:], norm.weight, norm.bias, norm.eps
            )

        layer.output.LayerNorm.register_forward_hook(behind)
    want = theirs_says(theirs, "bert")
    assert apart(ours(**rows("bert")).data, want, "bert") < LIMIT
    (want * torch.tensor(weight_of("bert", tuple(want.shape)))).sum().backward()
    out = ours(**rows("bert"))
    ops.sum(out * weight_of("bert", out.shape)).backward()
    for name, tensor in adapter.params.items():
        expected = values[name].grad.numpy()
        assert abs(tensor.grad - expected).max() < LIMIT * abs(expected).max(), name
