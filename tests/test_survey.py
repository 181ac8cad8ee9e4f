"""What a method may ask of the data before the first step, and what becomes of its answer."""

import numpy as np
import pytest
import tiny
from test_trainer import examples
from variants import quantizer

from refpeft import adapters, sites
from refpeft.batches import Batches, split
from refpeft.config import Train as Settings
from refpeft.errors import RefpeftError
from refpeft.survey import Survey, restore, settle, values, waiting
from refpeft.tensor import Tensor
from refpeft.trainer import Trainer

GAIN = {"peft_params": lambda site: {"s": np.ones(site.shape[0])}, "peft_linear": lambda x, base, p: base(x) * p.s}
SETTINGS = Settings(steps=3, batch=4, lr=0.01, save_every=1)


def survey(plugin, family: str = "llama", packer=None, **settings) -> Survey:
    model = tiny.model(family, quantizer=packer)
    adapter = sites.attach(model, plugin)
    tiny.scramble(adapter)
    return Survey(model, adapter, Batches(examples(), 4, 32), SETTINGS.model_copy(update=settings), 0)


@pytest.mark.parametrize("packer", [None, quantizer()])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_single_rows_by_the_dense_weights(family, packer, registered):
    asked = survey(registered(**GAIN), family, packer)
    rows = [row for step in range(2) for row in split(asked.batches.at(step), 1)] + [split(asked.batches.at(2), 1)[0]]
    found = list(asked.gradients(asked.adapter.sites, 9))
    plain = tiny.model(family, quantizer=packer)
    full = sites.attach(plain, "full", {"targets": [site.name for site in asked.adapter.sites]})
    for row, gradients in zip(rows, found, strict=True):
        expected = tiny.gradients(plain, row)
        for site in asked.adapter.sites:
            assert np.allclose(gradients[site.name], expected[f"{site.name}.weight"], rtol=1e-11, atol=1e-14)
    assert full.size and asked.model.adapters == [asked.adapter]


def test_own_gradients_are_those_of_the_methods_values(registered):
    asked = survey(registered(**GAIN))
    (found,) = asked.own_gradients(1)
    expected = tiny.gradients(asked.model, split(asked.batches.at(0), 1)[0])
    assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in found)
    assert all(tensor.grad is not None for tensor in asked.adapter.params.values())


def test_inputs_are_what_layers_read_without_padding_and_without_what_is_attached(registered):
    asked = survey(registered(**GAIN))
    plain, seen = tiny.model(), []
    site = plain.sites[asked.adapter.sites[1].name]
    inner = site.base
    site.base = lambda x, **rest: (seen.append(x.data), inner(x, **rest))[1]
    site.compose()
    for step, found in enumerate(asked.inputs(asked.adapter.sites, 2)):
        batch = asked.batches.at(step)
        plain(batch.ids, batch.positions, batch.segments)
        assert np.allclose(found[site.name], seen[-1][batch.segments >= 0], rtol=1e-12)
        assert found[site.name].shape == (batch.tokens, 24)
    assert not any(layer.site is None for layer in asked.model.sites[site.name].layers)
    assert len(asked.model.sites[site.name].layers) == 1


def test_what_the_head_reads_is_refused(registered):
    asked = survey(registered(**GAIN))
    with pytest.raises(RefpeftError, match="lm_head reads is not looked at: leave it out of the targets"):
        next(asked.inputs([asked.model.head], 1))


@pytest.mark.parametrize("packer", [None, quantizer()])
def test_changes_are_those_of_full_fine_tuning(packer, registered):
    asked = survey(registered(**GAIN), packer=packer)
    before = {name: weight() for name, weight in asked.model.frozen.items()}
    found = asked.changes(asked.adapter.sites, steps=2, lr=0.02)
    plain = tiny.model(quantizer=packer)
    sites.attach(plain, "full", {"targets": [site.name for site in asked.adapter.sites]})
    settings = Settings(steps=2, batch=4, lr=0.02, schedule="constant", warmup=0)
    Trainer(plain, asked.batches, None, settings).run()
    for site in asked.adapter.sites:
        expected = dict(plain.trained())[f"{site.name}.weight"].data - before[f"{site.name}.weight"]
        assert np.array_equal(found[site.name], expected) and expected.any()
    assert all(np.array_equal(weight(), before[name]) for name, weight in asked.model.frozen.items())


# ---- what becomes of it ----------------------------------------------------------------------------------------------


def chosen(calls: list | None = None) -> dict:
    """A method that trains the outputs with the largest gradients; a layer without any is left alone."""

    def peft_params(site):
        return {"s": np.ones(2), "rows": Tensor(np.zeros(2, np.int32))}

    def peft_survey(layers, survey, rng):
        if calls is not None:
            calls.append(rng.uniform())
        (found,) = survey.gradients([layer.site for layer in layers], 1)
        out = {}
        for layer in layers:
            size = abs(found[layer.site.name]).sum(axis=1)
            rows = np.sort(np.argsort(-size)[: 3 if layer.site.index else 2])
            out[layer.site.name] = {"rows": rows, "s": np.ones(len(rows))}
        out[layers[0].site.name] = None if len(layers) > 2 else out[layers[0].site.name]
        return out

    def peft_linear(x, base, p, site):
        place = np.zeros((len(p.rows.data), site.shape[0]))
        place[np.arange(len(p.rows.data)), p.rows.data] = 1
        return base(x) * ((p.s - 1).reshape(1, -1) @ Tensor(place) + 1)

    return {"peft_params": peft_params, "peft_survey": peft_survey, "peft_linear": peft_linear}


def run(plugin, targets=("@q",), out=None, **settings) -> Trainer:
    model = tiny.model()
    sites.attach(model, plugin)
    return Trainer(model, Batches(examples(), 4, 32), None, SETTINGS.model_copy(update=settings), out)


def test_the_data_decide_values_of_any_shape_before_the_first_step(registered):
    built = run(registered(**chosen()))
    shapes = {name: value.shape for name, value in built.model.adapters[0].params.items()}
    assert shapes == {"model.layers.0.self_attn.q_proj.s": (2,), "model.layers.1.self_attn.q_proj.s": (3,)}
    assert built.flat.values.size == 5
    rows = built.model.adapters[0].constants["model.layers.1.self_attn.q_proj.rows"].data
    assert rows.dtype.kind == "i" and len(set(rows.tolist())) == 3
    built.run()
    assert (built.flat.values != 1).all()


def test_the_data_are_asked_once_with_draws_of_the_runs_seed(registered):
    calls = []
    plugin = registered(**chosen(calls))
    for seed in (0, 1, 1):
        model = tiny.model()
        adapter = sites.attach(model, plugin)
        Trainer(model, Batches(examples(), 4, 32), None, SETTINGS, seed=seed)
        assert waiting(model) == [] and all(
            tensor.grad is None or not tensor.grad.any() for _, tensor in model.trained()
        )
        Trainer(model, Batches(examples(), 4, 32), None, SETTINGS, seed=seed)
    assert adapter.settled and len(calls) == 3 and calls[0] != calls[1] == calls[2]


def test_each_of_two_adapters_gets_back_what_was_decided_of_it(registered):
    def two():
        model = tiny.model()
        found = [sites.attach(model, plugin) for plugin in plugins]
        return model, found

    plugins = [registered(targets=(target,), **chosen()) for target in ("@q", "@v")]
    model, settled = two()
    settle(model, Batches(examples(), 4, 32), SETTINGS, 0)
    kept = values(settled)
    other, fresh = two()
    restore(other, fresh, kept)
    assert waiting(other) == [] and values(fresh).keys() == kept.keys()
    assert all(np.array_equal(array, kept[name]) for name, array in values(fresh).items())


def test_a_site_that_gets_nothing_is_left_alone(registered):
    built = run(registered(targets=("@q", "@k"), **chosen()))
    gone = "model.layers.0.self_attn.q_proj"
    assert not built.model.sites[gone].layers and not any(name.startswith(gone) for name in built.flat.params)
    assert len(built.model.adapters[0].layers) == 3
    built.run()
    sites.detach(built.model)
    assert np.array_equal(built.model(tiny.ids()).data, tiny.model()(tiny.ids()).data)


@pytest.mark.parametrize("targets", [("@q",), ("@q", "@k")])
def test_a_run_that_goes_on_does_not_ask_again_and_has_the_same_bits(targets, tmp_path, registered):
    calls = []
    plugin = registered(targets=targets, **chosen(calls))
    whole = run(plugin)
    whole.run()
    first = run(plugin, out=tmp_path)
    first._step()
    first._save()
    assert len(calls) == 2 and calls[0] == calls[1]
    again = run(plugin, out=tmp_path)
    again.run(resume=True)
    assert len(calls) == 2
    assert np.array_equal(again.flat.values, whole.flat.values)
    with pytest.raises(RefpeftError, match=r"is of another run: lr was 0\.01, now 0\.5"):
        run(plugin, out=tmp_path, lr=0.5)  # before what was found is lost
    assert len(calls) == 2


def test_an_adapter_from_a_file_is_not_settled_again(tmp_path):
    model = tiny.model()
    sites.attach(model, "lora")
    adapters.save(tmp_path, model)
    loaded = tiny.model()
    assert [adapter.settled for adapter in adapters.load(loaded, tmp_path)] == [True]
    assert not model.adapters[0].settled
