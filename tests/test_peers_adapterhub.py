"""Bottlenecks against AdapterHub's `adapters`, on the same tensors in float64, on GPT-2.

adapters 1.3.0 wants transformers 4.57, so this runs in an environment of its own and is skipped elsewhere:
pip install adapters==1.3.0 torch pytest, and this package.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from refpeft import learning, sites
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


def peer(config):
    """Their GPT-2 with the tiny model's weights and a random adapter; its trained parameters by name."""
    config_of = {name: value for name, value in tiny.GPT2_SMALL.items() if name != "model_type"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config_of, attn_implementation="eager"))
    tensors = {name: torch.tensor(array) for name, array in tiny.arrays(tiny.GPT2_SMALL).items()}
    model.load_state_dict(tensors, strict=False)
    adapters.init(model)
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


def difference(config, method: str, options: dict) -> float:
    model, trained = peer(config)
    ours = tiny.model("gpt2")
    for name, tensor in sites.attach(ours, method, options).params.items():
        tensor.data[...] = theirs(name, trained)
    want = model(input_ids=torch.from_numpy(tiny.ids()).long()).logits.detach().numpy()
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
