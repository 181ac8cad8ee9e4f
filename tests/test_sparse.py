"""Numbers of a weight that are trained alone: which ones are chosen, and files that say how many there are."""

import json

import numpy as np
import pytest
import tiny
from test_trainer import examples
from variants import quantizer

from refpeft import adapters, sites, sparse
from refpeft.batches import Batches, split
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.trainer import Trainer

METHODS = {"fish_mask": {"share": 0.01, "samples": 6, "targets": ["@q", "@v", "@down"]}}
BATCHES = Batches(examples(), 4, 32)


def trained(method: str, packer=None, **options):
    """A model with a method on it that has chosen its places and made two steps."""
    model = tiny.model("llama", quantizer=packer)
    adapter = sites.attach(model, method, METHODS[method] | options)
    Trainer(model, BATCHES, settings=Train(steps=2, lr=0.01)).run()
    return model, adapter


def places(adapter) -> dict[str, set[tuple[int, int]]]:
    return {layer.site.name: set(zip(*layer.p.indices.data.tolist(), strict=True)) for layer in adapter.layers}


@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_largest_of_all_matrices_together_are_chosen(count):
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((4, 5)), "b": rng.random((2, 3)) * 3, "c": rng.random((3, 2)) / 100}
    found = sparse.largest(scores, count)
    chosen = {name: scores[name][tuple(one["indices"])] for name, one in found.items() if one is not None}
    least = np.sort(np.concatenate([matrix.ravel() for matrix in scores.values()]))[-count]
    assert {name: len(values) for name, values in chosen.items()} == {
        name: (matrix >= least).sum() for name, matrix in scores.items() if (matrix >= least).any()
    }
    assert all((values >= least).all() for values in chosen.values())


def test_fish_mask_chooses_by_the_mean_of_squared_gradients_of_rows():
    _, adapter = trained("fish_mask")
    plain = tiny.model("llama")
    full = sites.attach(plain, "full", {"targets": METHODS["fish_mask"]["targets"]})
    information = {name: 0 for name in full.params}
    for row in [row for step in range(2) for row in split(BATCHES.at(step), 1)][:6]:
        for name, gradient in tiny.gradients(plain, row).items():
            information[name] = information[name] + gradient**2
    every = np.sort(np.concatenate([matrix.ravel() for matrix in information.values()]))
    count = round(0.01 * len(every))
    assert adapter.size == count
    found = places(adapter)
    for name, matrix in information.items():
        expected = set(zip(*(axis.tolist() for axis in np.nonzero(matrix >= every[-count])), strict=True))
        assert found.get(name.removesuffix(".weight"), set()) == expected


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", [None, quantizer("nf4", double_quant=False)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_its_own_places_and_as_many_as_it_has(method, packer, tmp_path):
    model, adapter = trained(method)
    first = tiny.model("llama")
    counts = {layer.site.name: layer.p.values.data.size for layer in adapter.layers}
    before = sites.attach(first, method, METHODS[method]).layers
    assert counts != {layer.site.name: layer.p.values.data.size for layer in before}
    adapters.save(tmp_path, model, quantizer=packer)
    other = tiny.model("llama")
    (loaded,) = adapters.load(other, tmp_path)
    assert places(loaded) == places(adapter) and loaded.settled
    if packer:
        adapters.quantize(model, packer)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    Trainer(other, BATCHES, settings=Train(steps=1)).run()
    assert places(loaded) == places(adapter)


def test_a_target_of_which_nothing_was_chosen_is_left_alone(tmp_path):
    model, adapter = trained("fish_mask", share=0.0005)
    assert 1 <= len(adapter.layers) < 6 and len(adapter.params) == len(adapter.constants) == len(adapter.layers)
    adapters.save(tmp_path, model)
    other = tiny.model("llama")
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.params.keys() == adapter.params.keys()
    assert sum(bool(site.layers) for site in other.sites.values()) == len(adapter.layers)


VALUES = "model.layers.0.self_attn.q_proj.values"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, "expected 'shapes', which the training data had decided"),
        ({}, "expected 'shapes', which the training data had decided"),
        ({"other": [1]}, "shapes has 'other' as"),
        ({VALUES: [2, 1]}, r"shapes has '.*values' as \[2, 1\], which this method has not"),
        ({VALUES: [-1]}, r"as \[-1\], which"),
        ({VALUES: [10**12]}, r"as \[1000000000000\], which"),
        ({VALUES: "1"}, "as 1, which"),
        ({VALUES: [1]}, "is not expected"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes, message, tmp_path):
    model, _ = trained("fish_mask")
    adapters.save(tmp_path, model)
    file = tmp_path / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shapes": shapes}))
    other = tiny.model("llama")
    with pytest.raises(RefpeftError, match=message):
        adapters.load(other, tmp_path)
    assert not any(site.layers for site in other.sites.values())


def test_values_and_indices_of_different_numbers_are_refused(tmp_path):
    model, adapter = trained("fish_mask")
    value = next(iter(adapter.params.values()))
    value.data = value.data[:-1]
    adapters.save(tmp_path, model)
    with pytest.raises(RefpeftError, match=rf"has {value.data.size} values and {value.data.size + 1} indices"):
        adapters.load(tiny.model("llama"), tmp_path)


def test_a_share_of_less_than_one_number_is_an_error():
    with pytest.raises(RefpeftError, match="fish_mask: share is 1e-05, less than one of the targets' 8,064 numbers"):
        sites.attach(tiny.model("llama"), "fish_mask", {"share": 1e-5})
