"""What holds of every method, though libraries rarely test it: rows of a batch, neighbours on the model, going on."""

import numpy as np
import pytest
import tiny
from test_trainer import examples
from variants import VARIANTS, attached, bare

from refpeft import manager, sites
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.models.base import Model
from refpeft.trainer import Trainer

LISTINGS = manager.catalogue()
BESIDE_OTHERS = [name for name, (method, _) in VARIANTS.items() if "peft_base" not in LISTINGS[method].hooks]
"""Variants that leave frozen weights alone, and so may be attached where others are."""

LINEAR_IN_ALPHA = ("lora", "adalora", "eva", "loha", "lokr", "randlora")
"""Methods whose update of a weight is `alpha` times something; that of DoRA is not, that of PiSSA goes from the weight
on."""


@pytest.mark.parametrize("name", VARIANTS)
def test_a_padded_row_and_packed_documents_are_what_they_are_alone(name):
    model, _ = attached("llama", name)
    ids = tiny.ids(2, 9)
    padded = model(ids, segments=np.array([[0] * 9, [0] * 6 + [-1] * 3])).data
    assert np.allclose(padded[0], model(ids[:1]).data[0], rtol=0, atol=1e-12)
    assert np.allclose(padded[1, :6], model(ids[1:, :6]).data[0], rtol=0, atol=1e-12)

    packed = model(ids[:1], np.array([[*range(4), *range(5)]]), np.array([[0] * 4 + [1] * 5])).data[0]
    alone = [model(ids[:1, part]).data[0] for part in (slice(4), slice(4, 9))]
    assert np.allclose(packed, np.concatenate(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BESIDE_OTHERS)
def test_a_second_adapter_leaves_the_first_and_the_base_as_they_were(name):
    model = bare("llama", name)
    first = sites.attach(model, "ia3")
    tiny.scramble(first)
    before, values = model(tiny.ids()).data, bits(model)
    second = sites.attach(model, *VARIANTS[name])
    tiny.scramble(second)
    tiny.gradients(model, tiny.batch())
    assert not np.array_equal(model(tiny.ids()).data, before)
    sites.detach(model, second)
    assert np.array_equal(model(tiny.ids()).data, before)
    assert all(np.array_equal(array, values[key]) for key, array in bits(model).items())


def bits(model: Model) -> dict[str, np.ndarray]:
    """Copies of all frozen weights and of what is trained."""
    trained = {name: tensor.data.copy() for name, tensor in model.trained()}
    return trained | {name: frozen().copy() for name, frozen in model.frozen.items()}


@pytest.mark.parametrize("name", [name for name, (method, _) in VARIANTS.items() if method in LINEAR_IN_ALPHA])
def test_twice_the_alpha_is_twice_the_update(name):
    method, options = VARIANTS[name]
    options = {key: value for key, value in options.items() if key != "modules_to_save"}
    alpha, patterns = options.get("alpha", 16.0), options.get("alpha_pattern", {})
    updates = []
    for factor in (1, 2):
        scaled = {"alpha": factor * alpha}
        scaled |= {"alpha_pattern": {key: factor * value for key, value in patterns.items()}} if patterns else {}
        model = tiny.model()
        adapter = sites.attach(model, method, options | scaled)
        tiny.scramble(adapter)
        changed = {site.name: site.weight() for site in adapter.sites}
        sites.merge(model)
        updates.append({key: model.sites[key].weight() - weight for key, weight in changed.items()})
    once, twice = updates
    for key, update in once.items():
        assert abs(update).max() > 1e-4
        assert np.allclose(twice[key], 2 * update, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_is_taken_up_again_ends_with_the_bits_of_a_whole_one(name, tmp_path):
    def trainer(out) -> Trainer:
        model = bare("llama", name, dtype="float32")
        method, options = VARIANTS[name]
        sites.attach(model, method, options, seed=3)
        settings = Train(steps=6, batch=4, micro_batch=3, save_every=3, lr=0.01, weight_decay=0.1)
        return Trainer(model, Batches(examples(), 4, 32, seed=3), None, settings, tmp_path / out, seed=3)

    whole, cut = trainer("whole"), trainer("cut")
    whole.run()
    cut._restore()
    for _ in range(4):
        cut._step()
        if cut._due(3):
            cut._save()
    again = trainer("cut")
    again.run(resume=True)
    assert again.summary.train_losses == whole.summary.train_losses
    for key, array in whole._arrays.items():
        assert np.array_equal(array, again._arrays[key]), key
