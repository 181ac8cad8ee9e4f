"""Bottlenecks against AdapterHub's `adapters`, on the same tensors in float64, and their files both ways.

adapters 1.3.0 wants transformers 4.57, so this runs in an environment of its own and is skipped elsewhere:
pip install adapters==1.3.0 torch pytest, and this package.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import tiny

from refpeft import adapterhub, learning, sites
from refpeft import adapters as files
from refpeft.conformance import conform
from refpeft.conformance.vectors import cases
from refpeft.models import gpt2
from refpeft.tensor import Tensor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("adapters")

pytestmark = pytest.mark.real
LIMIT = 1e-13

PLACES = {"attn_out": "attention_adapters", "mlp_out": "output_adapters", "block_out": "output_adapters"}
BOTTLENECK = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "scale": "scaling",
}
PHM = {  # their weights are (in, out): factors change places, and every matrix is transposed
    "down_s": "adapter_down.0.W_right",
    "down_t": "adapter_down.0.W_left",
    "down_bias": "adapter_down.0.b",
    "up_s": "adapter_up.W_right",
    "up_t": "adapter_up.W_left",
    "up_bias": "adapter_up.b",
}
SMALL, TWO = {"reduction_factor": 4}, {"reduction_factor": 4, "phm_dim": 2}
FACTORED = {"size": 6, "n": 2, "norms": False, "activation": "gelu"}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """transformers' RMSNorm and its rotary angles round to float32 inside; these do not."""
    module = importlib.import_module("transformers.models.llama.modeling_llama")

    def norm(self, x):
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())

    def rotary(self, x, position_ids):
        dim = self.config.hidden_size // self.config.num_attention_heads
        speeds = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = (position_ids[..., None] * speeds).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(module.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(module.LlamaRotaryEmbedding, "forward", rotary)


def bare_peer(family="gpt2"):
    """Their model with the tiny model's weights."""
    kinds = {"gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config)}
    kinds["llama"] = (transformers.LlamaForCausalLM, transformers.LlamaConfig)
    model_kind, config_kind = kinds[family]
    config_of = {name: value for name, value in tiny.CONFIGS[family].items() if name != "model_type"}
    model = model_kind(config_kind(**config_of, attn_implementation="sdpa"))
    tensors = {name: torch.tensor(array) for name, array in tiny.arrays(tiny.CONFIGS[family]).items()}
    model.load_state_dict(tensors, strict=False)
    adapters.init(model)
    return model.double()


def peer(config, family="gpt2"):
    """Their model with a random adapter; its trained parameters by name."""
    model = bare_peer(family)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    model.double().eval()
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model, {name: p.detach().numpy() for name, p in trained.items()}


def theirs(name: str, trained: dict[str, np.ndarray]) -> np.ndarray:
    """What our parameter `name` is there."""
    if name == "shared.rule":
        (rule,) = (array for key, array in trained.items() if key.endswith("phm_rule"))
        return rule.transpose(0, 2, 1)
    place, _, letter = name.rpartition(".")
    layer, _, place = place.rpartition(".")
    before = f"{layer}.{PLACES[place]}."
    found = {key: array for key, array in trained.items() if key.startswith(before)}
    end = PHM[letter] if any("W_left" in key for key in found) else BOTTLENECK[letter]
    (array,) = (array for key, array in found.items() if key.endswith(end))
    return array.transpose(0, 2, 1) if array.ndim == 3 and letter != "scale" else array


def logits_of(model) -> np.ndarray:
    return model(input_ids=torch.from_numpy(tiny.ids()).long()).logits.detach().numpy()


def difference(config, method: str, options: dict) -> float:
    model, trained = peer(config)
    ours = tiny.model("gpt2")
    for name, tensor in sites.attach(ours, method, options).params.items():
        tensor.data[...] = theirs(name, trained)
    want = logits_of(model)
    assert abs(want - tiny.model("gpt2")(tiny.ids()).data).max() > 0.1
    return abs(ours(tiny.ids()).data - want).max()


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (lambda: adapters.DoubleSeqBnConfig(**SMALL), "houlsby", {"size": 6, "activation": "silu", "norms": False}),
        (lambda: adapters.SeqBnConfig(**SMALL), "pfeiffer", {"size": 6}),
        (lambda: adapters.CompacterConfig(**TWO), "compacter", FACTORED),
        (lambda: adapters.CompacterPlusPlusConfig(**TWO), "compacter_pp", FACTORED | {"targets": ["@block_out"]}),
    ],
    ids=["houlsby", "pfeiffer", "compacter", "compacter_pp"],
)
def test_bottlenecks_are_those_of_adapterhub(config, method, options):
    assert difference(config(), method, options) < LIMIT


def test_a_fusion_is_that_of_adapterhub():
    """Values and penalty. Their keys have a bias, too, which adds the same to all scores of a token: nothing."""
    model, _ = peer(adapters.SeqBnConfig(**SMALL))
    both = adapters.composition.Fuse("a", "b")
    model.add_adapter("b", config=adapters.SeqBnConfig(**SMALL))
    model.add_adapter_fusion(both, "dynamic")
    model.set_active_adapters(both)
    model.double()
    added = {name: p for name, p in model.named_parameters() if ".adapters." in name or "fusion_layer" in name}
    ours = tiny.model("gpt2")
    fusion = sites.prepare(ours, "adapterfusion", {"size": 6, "adapters": ["a", "b"]}, fit=False)
    sites.put_on(ours, fusion)

    def values(letter: str, before: str) -> np.ndarray:
        if letter in BOTTLENECK:
            found = [added[f"{before}.adapters.{name}.{BOTTLENECK[letter]}"] for name in ("a", "b")]
        else:
            kind = "bias" if letter.endswith("_bias") else "weight"
            found = [added[f"{before}.adapter_fusion_layer.a,b.{letter.removesuffix('_bias')}.{kind}"]]
        arrays = np.stack([parameter.detach().numpy() for parameter in found])
        return arrays if letter in BOTTLENECK else arrays[0]

    torch.manual_seed(1)
    for drawn in (False, True):
        for parameter in added.values() if drawn else ():
            parameter.data = 0.3 * torch.randn_like(parameter)
        for layer in fusion.layers:
            before = layer.site.name.replace("block_out", "output_adapters")
            for letter, tensor in layer.values.items():
                if not drawn and letter == "value":
                    assert np.allclose(tensor.data, values(letter, before), rtol=1e-7, atol=0)  # theirs is float32
                tensor.data[...] = values(letter, before)
        want = model(input_ids=torch.from_numpy(tiny.ids()).long()).logits.detach().numpy()
        assert abs(ours(tiny.ids()).data - want).max() < LIMIT
    penalty = sum(float(term.data) for term in learning.penalties(ours))
    assert penalty == pytest.approx(model.get_fusion_regularization_loss().item(), rel=1e-13)


@pytest.mark.parametrize("scale", [4.0, "learned"])
def test_a_parallel_adapter_reads_what_the_mlp_reads_and_adapterhubs_what_stands_before_the_norm(scale, monkeypatch):
    config, options = adapters.ParBnConfig(scaling=scale, **SMALL), {"size": 6, "learn_scale": scale == "learned"}
    assert difference(config, "parallel", options) > 0.01
    inside = gpt2.Layer._mlp

    def layer(self, x: Tensor, **around: object) -> Tensor:
        x = x + self.attn_out(self.norm1(x), **around)
        return x + self.mlp_out(x)

    monkeypatch.setattr(gpt2.Layer, "_layer", layer)  # the norm as a part of the MLP, whose input is then the stream
    monkeypatch.setattr(gpt2.Layer, "_mlp", lambda self, x: inside(self, self.norm2(x)))
    assert difference(config, "parallel", options) < LIMIT


# ---- files -----------------------------------------------------------------------------------------------------------

THEIRS = {
    "seq_bn": lambda: adapters.SeqBnConfig(**SMALL),
    "seq_bn-inside": lambda: adapters.SeqBnConfig(**SMALL, original_ln_before=False, non_linearity="gelu_new"),
    "double_seq_bn": lambda: adapters.DoubleSeqBnConfig(**SMALL, leave_out=[0]),
    "attention": lambda: adapters.DoubleSeqBnConfig(reduction_factor=5, output_adapter=False, non_linearity="tanh"),
    "compacter": lambda: adapters.CompacterConfig(**TWO, phm_rank=2),
    "compacter++": lambda: adapters.CompacterPlusPlusConfig(**TWO),
}
OURS = {
    "pfeiffer": {"size": 5, "layers": [1]},
    "houlsby": {"size": 7, "norms": False},
    "compacter": FACTORED | {"rank": 2},
    "compacter_pp": FACTORED,
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", THEIRS)
def test_their_files_have_the_same_logits_here(family, name, tmp_path):
    model, _ = peer(THEIRS[name](), family)
    model.save_adapter(str(tmp_path), "a", use_safetensors=True)
    ours = tiny.model(family)
    (adapter,) = files.load(ours, tmp_path)
    assert adapter.size == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(ours(tiny.ids()).data - tiny.model(family)(tiny.ids()).data).max() > 0.01
    assert abs(ours(tiny.ids()).data - logits_of(model)).max() < LIMIT


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", OURS)
def test_our_files_have_the_same_logits_there(family, method, tmp_path):
    ours = tiny.model(family)
    adapter = sites.attach(ours, method, OURS[method])
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")  # the dtype in which they make an adapter that they read
    adapterhub.save(tmp_path, ours, adapter, "mine")
    model = bare_peer(family).float()
    model.load_adapter(str(tmp_path), use_safetensors=True, set_active=True)
    assert model.adapters_config.adapters["mine"]
    assert abs(ours(tiny.ids()).data - logits_of(model.double().eval())).max() < LIMIT


@pytest.mark.parametrize("alpha", [1, 400])
def test_gates_of_lora_are_unipelts_where_a_row_has_one_token_and_alpha_has_no_effect(alpha):
    """AdapterHub averages gates over a row. UniPELT's paper has the gate in place of alpha / r."""
    model, trained = peer(adapters.LoRAConfig(r=3, alpha=alpha, use_gating=True), "llama")
    model.set_active_adapters("a")
    ours = tiny.model()
    adapter = sites.attach(ours, "unipelt", {"r": 3, "targets": ["@q", "@v"]})
    names = {"A": "lora_A", "B": "lora_B", "gate": "gate.weight", "gate_bias": "gate.bias"}
    for name, tensor in adapter.params.items():
        site, _, letter = name.rpartition(".")
        tensor.data[...] = trained[f"{site}.loras.a.{names[letter]}"]
    ids = tiny.ids(5, 1)
    want = model(input_ids=torch.from_numpy(ids).long()).logits.detach().numpy()
    assert abs(ours(ids).data - want).max() < LIMIT * abs(want).max()
    several = tiny.ids()
    averaged = model(input_ids=torch.from_numpy(several).long()).logits.detach().numpy()
    assert abs(ours(several).data - averaged).max() > 1e-3


# ---- what the vectors say ------------------------------------------------------------------------------------------


def test_its_prefixes_are_right_in_eager_attention(monkeypatch):
    """In SDPA, the default, all of these fail: golden/reports/adapters-1.3.0.md."""
    monkeypatch.undo()  # all is computed in float32, as it comes
    monkeypatch.syspath_prepend(Path(__file__).parent / "peers")
    import adapterhub_1_3

    prefixes = [c for c in cases() if c.name in ("prefix_tuning", "p_tuning_v2") and c.at in ("model", "train")]
    assert len(prefixes) >= 24
    monkeypatch.setattr(adapterhub_1_3, "ATTENTION", "eager")
    assert conform(adapterhub_1_3.AdapterHub(), prefixes, ["float32"]).ok
