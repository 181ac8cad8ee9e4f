"""Soft prompts: where first values come from, and networks that give rows, keys and values."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_files

import refpeft
from refpeft import adapters, prompts, sites
from refpeft.errors import RefpeftError

# ---- prompt tuning: first values -------------------------------------------------------------------------------------


def first_rows(model, **options) -> np.ndarray:
    (prompt,) = sites.attach(model, "prompt_tuning", options).params.values()
    return prompt.data


def test_prompts_start_from_the_rows_of_tokens():
    model = tiny.model()
    table = model.embed.weight()
    prompt = sites.attach(model, "prompt_tuning", {"tokens": 5, "init": "ids", "ids": [7, 3]}).params
    assert np.array_equal(prompt["model.embed_tokens.prompt"].data, table[[7, 3, 7, 3, 7]])
    sites.detach(model)
    prompt = sites.attach(model, "prompt_tuning", {"tokens": 5}).params["model.embed_tokens.prompt"].data
    assert all(any(np.array_equal(row, known) for known in table) for row in prompt)


@pytest.fixture
def with_tokenizer(tmp_path):
    return refpeft.load(tiny_files.write_model(tmp_path / "model"), dtype="float64")


@pytest.mark.parametrize("tokens", [2, 4, 11])
def test_prompts_start_from_the_tokens_of_a_text_cut_or_repeated(with_tokenizer, tokens):
    ids = with_tokenizer.tokenizer.encode("hello world yes no")
    assert len(ids) == 4
    rows = first_rows(with_tokenizer, tokens=tokens, init="text", text="hello world yes no")
    assert np.array_equal(rows, with_tokenizer.embed.weight()[(ids * 3)[:tokens]])


def test_prompts_start_from_common_tokens_and_no_special_ones(with_tokenizer):
    table, specials = with_tokenizer.embed.weight(), with_tokenizer.tokenizer.added_ids
    assert specials == {0, 1, 2}
    rows = first_rows(with_tokenizer, tokens=200, common=7)
    drawn = {int(np.flatnonzero((table == row).all(axis=1))[0]) for row in rows}
    assert drawn == {3, 4, 5, 6, 7, 8, 9}


def test_a_text_begins_as_the_models_own_texts_do():
    asked = []
    tokenizer = SimpleNamespace(encode=lambda text, specials=False: asked.append(specials) or [1, 5])
    assert prompts.text_ids(tokenizer, "say it") == [1, 5] and asked == [True]


def test_a_text_for_a_model_without_a_tokenizer_is_an_error():
    with pytest.raises(
        RefpeftError, match=r"'say it' cannot become tokens: the model has no tokenizer; give their numb"
    ):
        first_rows(tiny.model(), init="text", text="say it")


def test_a_file_says_where_its_first_rows_came_from(with_tokenizer, tmp_path):
    options = {"tokens": 3, "init": "text", "text": "hello world"}
    adapter = sites.attach(with_tokenizer, "prompt_tuning", options)
    tiny.scramble(adapter)
    adapters.save(tmp_path / "adapter", with_tokenizer)
    sites.detach(with_tokenizer)
    with_tokenizer.tokenizer = None  # which nobody asks any more
    (loaded,) = adapters.load(with_tokenizer, tmp_path / "adapter")
    assert loaded.cfg == adapter.cfg
    assert np.allclose(
        loaded.params["model.embed_tokens.prompt"].data, adapter.params["model.embed_tokens.prompt"].data
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prompt_tuning", {"init": "text"}, 'init = "text" and `text` belong together'),
        ("prompt_tuning", {"text": "yes"}, 'init = "text" and `text` belong together'),
        ("prompt_tuning", {"ids": [3]}, 'init = "ids" and a list `ids`'),
        ("prompt_tuning", {"init": "ids", "ids": [3, 40]}, "ids names 40: the model has tokens 0 to 39"),
        ("prompt_tuning", {"common": 0}, "common is 0: expected 1 or more"),
        ("prompt_tuning", {"init": "random", "common": 9}, 'common has an effect only with init = "vocab"'),
        ("p_tuning", {"tokens": 0}, "tokens is 0: expected 1 or more"),
        ("p_tuning", {"encoder": "none", "hidden": 4}, "hidden has no effect with encoder"),
        ("p_tuning", {"encoder": "mlp", "dropout": 0.1}, 'dropout has an effect only with encoder = "lstm"'),
        ("prefix_tuning", {"hidden": -1}, "expected hidden of at least 0"),
        ("p_tuning_v2", {"dropout": 1.0}, "dropout of at least 0 and less than 1"),
    ],
)
def test_options_that_cannot_be_are_errors(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), method, options)


# ---- special tokens, and prompts in layers ---------------------------------------------------------------------------


def test_behind_a_layer_special_tokens_are_what_was_trained():
    """Two of them, with others between, before and behind: each replaces its own rows alone."""
    model = tiny.model()
    first = sites.attach(model, "pre_layer", {"tokens": 2})
    sites.attach(model, "prompt_tuning", {"tokens": 3})
    last = sites.attach(model, "pre_layer", {"tokens": 1})
    seen, layer = [], model.layers[1].block_out
    layer.base = lambda x, inner=layer.base, **around: seen.append(x.data) or inner(x, **around)
    layer.compose()
    model(tiny.ids(2, 5))
    (x,) = seen
    assert x.shape[1] == 1 + 3 + 2 + 5
    for adapter, rows in ((last, slice(0, 1)), (first, slice(4, 6))):
        assert (x[:, rows] == adapter.params["model.layers.0.block_out.rows"].data).all()


def test_pre_layer_takes_no_other_targets():
    with pytest.raises(RefpeftError, match="pre_layer goes through all layers: leave its targets as they are"):
        sites.attach(tiny.model(), "pre_layer", {"targets": ["@embed", "0.block_out"]})


@pytest.mark.parametrize("count", [0, 3])
def test_llama_adapter_in_more_layers_than_there_are_is_an_error(count):
    with pytest.raises(RefpeftError, match=rf"llama_adapter: count is {count}: expected 1 to 2, the layers that there"):
        sites.attach(tiny.model(), "llama_adapter", {"count": count})


# ---- networks --------------------------------------------------------------------------------------------------------


def test_dropout_falls_on_the_prefix_in_training_alone():
    model = tiny.model()
    sites.attach(model, "p_tuning_v2", {"tokens": 3, "dropout": 0.5, "init_std": 1.0})
    evaluated = model(tiny.ids()).data
    model.mode.training = True
    first = model(tiny.ids()).data
    assert abs(first - evaluated).max() > 1e-3
    assert np.array_equal(model(tiny.ids()).data, first)  # seed and step decide
    model.mode.step = 1
    assert abs(model(tiny.ids()).data - first).max() > 1e-3


def test_dropout_falls_between_the_layers_of_the_lstm():
    model = tiny.model()
    adapter = sites.attach(model, "p_tuning", {"tokens": 3, "dropout": 0.5})
    (layer,) = adapter.layers
    evaluated = prompts.encoded(layer.p).data
    model.mode.training = True
    assert abs(prompts.encoded(layer.p, 0.5, layer.train()).data - evaluated).max() > 1e-3
    assert np.array_equal(prompts.encoded(layer.p, 0.0, layer.train()).data, evaluated)


def test_first_values_have_the_distribution_that_is_said():
    model = tiny.model()
    values = {
        key.rpartition(".")[2]: t.data for key, t in sites.attach(model, "p_tuning", {"hidden": 64}).params.items()
    }
    for name, width in (("weight_ih_l0", 64), ("bias_hh_l1_reverse", 64), ("mlp0", 128), ("mlp1_bias", 128)):
        assert abs(values[name]).max() <= width**-0.5 < abs(values[name]).max() * 1.1, name
    sites.detach(model)
    values = {
        key.rpartition(".")[2]: t.data for key, t in sites.attach(model, "p_tuning_v2", {"hidden": 64}).params.items()
    }
    assert values["outer"].std() == pytest.approx(0.02, rel=0.05) and not values["outer_bias"].any()
    assert values["rows"].std() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_after_the_prefix_or_as_if_it_were_not_there(family):
    found, ids = {}, tiny.ids(2, 6)
    for positions in ("after", "zero"):
        model = tiny.model(family)
        sites.attach(model, "prefix_tuning", {"tokens": 3, "positions": positions})
        found[positions] = model(ids, np.broadcast_to(np.arange(6) + 3 * (positions == "zero"), ids.shape)).data
    assert np.allclose(found["after"], found["zero"], rtol=0, atol=1e-12)


def test_a_prefix_of_the_models_own_keys_is_the_text_itself():
    """Keys and values of earlier tokens as the prefix give what the model says of the whole text."""
    model, ids = tiny.model(), tiny.ids(1, 8)
    whole = model(ids).data
    kept = {}
    for site in model.sites.values():
        if site.kind == "attention":
            inner = site.base

            def spy(q, k, v, name=site.name, inner=inner, **rest):
                kept[name] = k.data[0, :, :3], v.data[0, :, :3]
                return inner(q, k, v, **rest)

            site.base = spy
            site.compose()
    model(ids)
    fresh = tiny.model()
    adapter = sites.attach(fresh, "prefix_tuning", {"tokens": 3})
    for name, (keys, values) in kept.items():
        adapter.params[f"{name}.keys"].data[...] = keys
        adapter.params[f"{name}.values"].data[...] = values
    assert abs(fresh(ids[:, 3:]).data - whole[:, 3:]).max() < 1e-12
