"""QDoRA is DoRA on quantized weights, and says so where they are not."""

import numpy as np
import pytest
import tiny
from variants import quantizer

from refpeft import adapters, files, sites
from refpeft.errors import RefpeftError

OPTIONS = {
    "r": 3,
    "alpha": 5.0,
    "rslora": True,
    "rank_pattern": {".*1.*": 2},
    "targets": ["@q", "@down"],
    "layers": [0, 1],
}


def on_nf4(method: str, **options):
    model = tiny.model("llama", quantizer=quantizer())
    adapter = sites.attach(model, method, OPTIONS | options)
    tiny.scramble(adapter)
    return model, adapter


def test_it_is_dora_with_the_same_options():
    ours, adapter = on_nf4("qdora")
    dora, same = on_nf4("dora")
    assert adapter.name == "qdora" and [layer.part.name for layer in adapter.layers] == ["dora"] * 4
    for key, tensor in adapter.params.items():  # first values are drawn under the adapter's own name
        tensor.data[...] = same.params[key].data
    assert adapter.params.keys() == same.params.keys()
    assert np.array_equal(ours(tiny.ids()).data, dora(tiny.ids()).data)
    found, expected = (tiny.gradients(model, tiny.batch()) for model in (ours, dora))
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_its_magnitudes_are_the_norms_of_the_decoded_weight():
    model = tiny.model("llama", quantizer=quantizer())
    adapter = sites.attach(model, "qdora", OPTIONS)
    for layer in adapter.layers:
        assert np.allclose(layer.arrays.m, np.linalg.norm(layer.site.weight(), axis=1), rtol=1e-12)


def test_its_file_is_that_of_dora(tmp_path):
    model, _ = on_nf4("qdora")
    adapters.save(tmp_path, model)
    config = files.read_json(tmp_path / adapters.CONFIG)
    assert config["peft_type"] == "LORA" and config["use_dora"] and config["rank_pattern"] == {".*1.*": 2}
    other = tiny.model("llama", quantizer=quantizer())
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.name == "dora"
    assert np.allclose(other(tiny.ids()).data, model(tiny.ids()).data, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("packer", "options", "message"),
    [
        (None, {}, "qdora: model.layers.0.self_attn.q_proj is dense: give a quantizer, such as nf4, or take dora"),
        (quantizer(), {"targets": ["lm_head"], "layers": None}, "qdora: lm_head is dense"),
    ],
)
def test_a_dense_target_is_an_error(packer, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model("llama", quantizer=packer), "qdora", {"r": 2} | options)
