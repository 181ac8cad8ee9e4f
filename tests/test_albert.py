"""ALBERT: what is different where a layer is run several times. Equality with transformers is in test_encoder.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_encoder import CONFIGS, rows, weigh

from refpeft import adapters, fused, sites
from refpeft.batches import Batch
from refpeft.errors import RefpeftError
from refpeft.models.albert import Albert
from refpeft.models.config import from_hf
from refpeft.survey import Survey

SHARED = CONFIGS["albert"] | {"num_hidden_layers": 3, "num_hidden_groups": 1, "max_position_embeddings": 40}
APART = SHARED | {"num_hidden_groups": 3}


def unshared(model: Albert) -> Albert:
    """A model that computes the same, whose layers have weights of their own."""
    apart = tiny.of(APART)
    for name, weight in apart.frozen.items():
        weight.array[...] = model.frozen[shared(name)].array
    return apart


def shared(name: str) -> str:
    """The name that a weight or value of some layer has in the model with one."""
    return name.replace("groups.1.", "groups.0.").replace("groups.2.", "groups.0.")


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix_tuning", "unipelt", "full"])
def test_an_adapter_acts_in_every_run_of_its_layer_and_its_gradients_add_up(method):
    model, given = tiny.of(SHARED), rows("albert")
    apart = unshared(model)
    adapter, each = sites.attach(model, method), sites.attach(apart, method)
    tiny.scramble(adapter)
    for name, tensor in each.params.items():
        tensor.data[...] = adapter.params[shared(name)].data
    expected = weigh(apart, given)
    assert weigh(model, given).data == pytest.approx(expected.data, rel=1e-13)
    weigh(model, given).backward()
    expected.backward()
    sums = {name: np.zeros_like(tensor.data) for name, tensor in adapter.params.items()}
    for name, tensor in each.params.items():
        sums[shared(name)] += tensor.grad
    for name, tensor in adapter.params.items():
        assert np.allclose(tensor.grad, sums[name], rtol=0, atol=1e-11 * max(abs(sums[name]).max(), 1)), name


def test_dropout_differs_from_run_to_run_and_is_the_same_again_where_a_layer_is_recomputed(monkeypatch):
    masks, dropout = [], fused.dropout

    def watched(x, **options):
        y = dropout(x, **options)
        masks.append((y.data == 0).tobytes())
        return y

    monkeypatch.setattr(fused, "dropout", watched)
    gradients = []
    for checkpointing in (False, True):
        model = tiny.of(SHARED)
        adapter = sites.attach(model, "lora", {"targets": ["@q"], "dropout": 0.5})
        tiny.scramble(adapter)
        model.mode.training, model.checkpointing = True, checkpointing
        weigh(model, rows("albert")).backward()
        gradients.append({name: tensor.grad for name, tensor in adapter.params.items()})
    once, again = masks[:3], masks[3:]
    assert len(set(once)) == 3 and again == once + once[::-1]
    assert all(np.array_equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("method", ["ladder_side", "attention_fusion", "pre_layer", "adapterdrop"])
def test_methods_that_treat_layers_differently_are_refused_where_these_are_the_same(method):
    options = {"r": 3} if method == "ladder_side" else {}
    with pytest.raises(
        RefpeftError, match=f"{method} treats a model's layers differently, and this model runs one 3 ti"
    ):
        sites.attach(tiny.of(SHARED), method, options)
    apart, given = tiny.of(APART), rows("albert")
    adapter = sites.attach(apart, method, options)
    tiny.scramble(adapter)
    tiny.assert_slope(adapter, lambda: weigh(apart, given))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"layers": [1]}, "layers names 1: the model has layers 0 to 0"),
        ("top_layers", {}, "count is 2: expected 1 to 1, the layers that there are"),
        ("s4", {}, "expected sizes that add up to the model's 1 layers"),
        ("llama_adapter", {"count": 2}, "count is 2: expected 1 to 1, the layers that there are"),
    ],
)
def test_a_layer_has_one_number_however_often_it_is_run(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.of(SHARED), method, options)


def test_what_a_layer_reads_in_all_its_runs_is_looked_at(monkeypatch):
    model, given = tiny.of(SHARED), rows("albert")
    monkeypatch.setattr(model, "head", None, raising=False)
    adapter, apart = sites.attach(model, "eva", {"targets": ["@q", "@k", "@down"], "r": 2}), unshared(model)
    expected: dict[str, list[np.ndarray]] = {site.name: [] for site in adapter.sites}
    for name, into in ((site.name, expected.get(shared(site.name))) for site in apart.sites.values()):
        if into is not None:
            site = apart.sites[name]
            site.base = lambda x, base=site.base, into=into, **rest: (into.append(x.data), base(x, **rest))[1]
            site.compose()
    apart(given["ids"], segments=given["segments"])
    batch = Batch(given["ids"], np.zeros_like(given["ids"]), segments=given["segments"])
    asked = Survey(model, adapter, SimpleNamespace(at=lambda step: batch), None, 0)
    first, second = asked.inputs(adapter.sites, 2)
    for name, arrays in expected.items():
        assert np.allclose(first[name], np.concatenate([x[given["segments"] >= 0] for x in arrays]), rtol=1e-12)
        assert np.array_equal(first[name], second[name])
    q, k, _ = (site.name for site in adapter.sites)
    assert first[q] is first[k]


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "p_tuning", "unipelt"])
def test_adapters_are_written_and_read_again(method, tmp_path):
    model, again = tiny.of(SHARED), tiny.of(SHARED)
    tiny.scramble(sites.attach(model, method))
    adapters.save(tmp_path, model)
    adapters.load(again, tmp_path)
    given = rows("albert", padded=False)
    assert np.allclose(model(**given).data, again(**given).data, rtol=0, atol=1e-5)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about themselves
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_peft_reads_its_adapters(method, tmp_path):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    model, given = tiny.of(SHARED), rows("albert")
    tiny.scramble(sites.attach(model, method, {"tokens": 3} if method == "prompt_tuning" else {"r": 2}))
    adapters.save(tmp_path, model)
    peer = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**SHARED))
    weights = {name.removeprefix("albert."): torch.tensor(array) for name, array in tiny.drawn(SHARED).items()}
    peer.load_state_dict(weights, strict=False)
    peer = peft.PeftModelForFeatureExtraction.from_pretrained(peer.double(), tmp_path, autocast_adapter_dtype=False)
    real = given["segments"] >= 0
    theirs = peer.double().eval()(torch.tensor(given["ids"]), attention_mask=torch.tensor(real * 1)).last_hidden_state
    ours = model(given["ids"], segments=given["segments"]).data
    assert abs(ours - theirs.detach().numpy()[:, -9:])[real].max() < 1e-5


def test_the_published_config_is_read():
    published = {
        "architectures": ["AlbertForMaskedLM"],
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 2,
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 128,
        "eos_token_id": 3,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "inner_group_num": 1,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "layers_to_keep": [],
        "max_position_embeddings": 512,
        "model_type": "albert",
        "net_structure_type": 0,
        "num_attention_heads": 12,
        "num_hidden_groups": 1,
        "num_hidden_layers": 12,
        "num_memory_blocks": 0,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30000,
    }
    config = from_hf(published)
    assert (config.width, config.dim, config.layers, config.groups) == (128, 768, 12, 1)
    assert config.order == (0,) * 12 and config.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_group_num": 2}, "config key inner_group_num = 2: for albert, refpeft has only 1"),
        ({"net_structure_type": 1}, "config key net_structure_type = 1: for albert, refpeft has only 0"),
        ({"num_hidden_groups": 6}, "num_hidden_groups = 6: there are only 5 layers to share their weights"),
        ({"embedding_size": 0}, "config key embedding_size = 0: expected a whole number of at least 1"),
        ({"adapters": {}}, "config key 'adapters' = {} is not known for albert"),
    ],
)
def test_a_config_that_asks_for_other_maths_is_refused(change, message):
    with pytest.raises(RefpeftError, match=message):
        from_hf(CONFIGS["albert"] | change)
