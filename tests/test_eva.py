"""EVA: its directions against a plain SVD, how ranks are shared out, its scale, its files, and PEFT's own."""

import numpy as np
import pytest
import tiny
from test_trainer import examples

from refpeft import adapters, directions, files, sites, survey
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.directions import Directions, shared_out
from refpeft.errors import RefpeftError
from refpeft.trainer import Trainer

SETTINGS = Train(steps=2, batch=4, lr=0.02, save_every=1)


def settled(options: dict, family: str = "llama", data: Batches | None = None):
    model = tiny.model(family)
    adapter = sites.attach(model, "eva", options)
    survey.settle(model, data or Batches(examples(), 8, 32), SETTINGS, 0)
    return model, adapter


def rows(count: int, width: int = 10, seed: int = 0) -> np.ndarray:
    """Numbers whose directions have lengths far apart."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((count, width))
        * 2.0 ** -np.arange(width)
        @ np.linalg.qr(np.random.default_rng(9).standard_normal((width, width)))[0]
        + 3.0
    )


def plain(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The principal directions of rows, and the shares of variance that they explain."""
    _, lengths, vectors = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    vectors *= np.sign(vectors[np.arange(len(vectors)), abs(vectors).argmax(axis=1)])[:, None]
    return vectors[:count], (lengths**2 / (lengths**2).sum())[:count]


def test_directions_of_one_batch_are_its_singular_vectors():
    found = Directions(4)
    found.add(rows(30), 0.99)
    vectors, ratios = plain(rows(30), 4)
    assert np.allclose(found.vectors, vectors, rtol=0, atol=1e-7)
    assert np.allclose(found.ratios, ratios, rtol=1e-9)
    assert not found.steady.any()


def test_directions_of_all_the_width_are_exact_however_the_rows_come():
    found, every = Directions(10), []
    for seed, count in enumerate((12, 30, 10, 25)):
        every.append(rows(count, seed=seed) + seed)
        found.add(every[-1], 0.99)
    vectors, ratios = plain(np.concatenate(every), 10)
    assert np.allclose(abs((found.vectors * vectors).sum(axis=1)), 1, rtol=1e-6)
    assert np.allclose(found.ratios, ratios, rtol=1e-6, atol=1e-12)


def test_a_direction_is_steady_once_it_turns_no_more():
    found = Directions(2)
    found.add(rows(40), 0.999)
    found.add(rows(40), 0.999)
    assert found.steady.all()
    found.add(100 * rows(40, seed=5)[:, ::-1], 0.999)
    assert not found.steady.all()


def test_the_largest_shares_are_taken_and_of_equal_ones_the_first():
    ratios = {"a": np.array([0.5, 0.1]), "b": np.array([0.5, 0.1]), "c": np.array([0.05, 0.01])}
    assert shared_out(ratios, 3) == {"a": 2, "b": 1, "c": 0}


def test_batches_are_taken_until_what_is_needed_is_steady():
    taken = []

    def batches():
        for step in range(50):
            taken.append(step)
            yield {"one": rows(40, seed=step)}

    found = directions.explore(batches(), {"one": 2}, 1.0, 0.99)
    assert found["one"].shape == (2, 10) and 2 <= len(taken) < 10


def test_directions_that_nobody_takes_need_not_be_steady():
    taken = []

    def batches():
        rng = np.random.default_rng(0)
        for step in range(50):
            taken.append(step)
            yield {"one": rng.standard_normal((40, 10)) * np.array([9.0, 4.0, *[1.0] * 8])}

    found = directions.explore(batches(), {"one": 2}, 2.0, 0.9999)
    assert found["one"].shape == (2, 10) and len(taken) < 20


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_all_targets_together_keep_their_ranks_and_A_is_the_svd_of_what_a_layer_reads(rho):
    options = {"r": 3, "rho": rho, "batches": 1, "targets": "all-linear"}
    model, adapter = settled(options)
    ranks = {layer.site.name: layer.arrays.A.shape[0] for layer in adapter.layers}
    chosen = [site for site in model.sites.values() if site.kind == "linear" and "head" not in site.roles]
    assert sum(ranks.values()) == 3 * len(chosen)
    assert (set(ranks.values()) == {3}) == (rho == 1)
    (inputs,) = survey.Survey(model, adapter, Batches(examples(), 8, 32), SETTINGS, 0).inputs(chosen, 1)
    for layer in adapter.layers:
        vectors, _ = plain(inputs[layer.site.name], ranks[layer.site.name])
        assert np.allclose(layer.arrays.A, vectors, rtol=0, atol=1e-6)
        assert layer.arrays.B.shape == (layer.site.shape[0], ranks[layer.site.name]) and not layer.arrays.B.any()
    q, k, o = (inputs[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q is k and q is not o  # what reads the same is explored once


def test_a_target_without_a_direction_is_left_out_of_training_and_of_the_file(tmp_path):
    model, adapter = settled({"r": 1, "rho": 8.0, "targets": "all-linear"})
    names = {layer.site.name for layer in adapter.layers}
    assert len(names) < 14 and set(adapter.params) == {f"{name}.{letter}" for name in names for letter in "AB"}
    tiny.scramble(adapter)
    adapters.save(tmp_path, model)
    config = files.read_json(tmp_path / adapters.CONFIG)
    assert config["init_lora_weights"] == "eva"
    other = tiny.model()
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.name == "lora" and {site.name for site in loaded.sites} == names
    assert np.allclose(other(tiny.ids()).data, model(tiny.ids()).data, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rslora", "adjust"), [(False, True), (True, True), (False, False), (True, False)])
def test_the_scale_goes_with_the_rank_as_the_file_says(rslora, adjust, tmp_path):
    options = {"r": 2, "alpha": 5.0, "rho": 3.0, "rslora": rslora, "adjust_scaling": adjust, "targets": "all-linear"}
    model, adapter = settled(options)
    for layer in adapter.layers:
        rank = layer.arrays.A.shape[0]
        alpha = 5.0 * rank / 2 if adjust else 5.0
        expected = alpha / (rank**0.5 if rslora else rank)
        assert adapter.cfg.scale_of(layer.site, rank) == pytest.approx(expected, rel=1e-14)
    adapters.save(tmp_path, model)
    (lora,) = adapters.load(tiny.model(), tmp_path)
    for layer in adapter.layers:
        assert lora.cfg.scale(layer.site) == adapter.cfg.scale_of(layer.site, layer.arrays.A.shape[0])


def test_alpha_grows_from_the_rank_that_a_pattern_gives():
    adapter = sites.attach(tiny.model(), "eva", {"r": 2, "alpha": 5.0, "rank_pattern": {"q_proj": 4}})
    scales = {layer.site.name.rpartition(".")[2]: adapter.cfg.scale_of(layer.site, 8) for layer in adapter.layers}
    assert scales == {"q_proj": 5 / 4, "v_proj": 5 / 2}


def test_no_more_batches_are_looked_at_than_it_is_told():
    data = Batches(examples(), 4, 32)
    options = {"r": 2, "rho": 1.0, "tau": 1.0, "targets": ["@q"], "layers": [0]}
    model, adapter = settled(options | {"batches": 1}, data=data)
    (layer,) = adapter.layers
    first, second = survey.Survey(model, adapter, data, SETTINGS, 0).inputs([layer.site], 2)
    vectors, _ = plain(first[layer.site.name], 2)
    assert np.allclose(layer.arrays.A, vectors, rtol=0, atol=1e-6)
    assert not np.allclose(layer.arrays.A, plain(second[layer.site.name], 2)[0], rtol=0, atol=1e-3)


def test_layers_that_read_the_same_may_have_ranks_of_their_own_and_a_batch_just_as_many_tokens():
    x = rows(10)
    found = directions.explore([{"few": x, "many": x}], {"few": 1, "many": 5}, 2.0, 0.99)
    assert len(found["few"]) == len(found["many"]) == 3
    assert all(np.allclose(own, plain(x, len(own))[0], rtol=0, atol=1e-6) for own in found.values())


def test_batches_with_too_few_tokens_are_an_error():
    with pytest.raises(RefpeftError, match=r"24 directions are asked for at .*, but no batch has as many tokens"):
        settled({"r": 12}, data=Batches(examples(3), 1, 32))


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"tau": 0.0}, {"batches": 0}])
def test_options_that_cannot_be_are_errors(options):
    with pytest.raises(RefpeftError, match="expected rho of at least 1, tau above 0"):
        sites.attach(tiny.model(), "eva", options)


def test_a_run_that_goes_on_has_the_ranks_of_its_start(tmp_path):
    def trainer(out):
        model = tiny.model()
        sites.attach(model, "eva", {"r": 2, "targets": "all-linear"})
        return Trainer(model, Batches(examples(), 4, 32), None, SETTINGS, out)

    whole = trainer(tmp_path / "whole")
    whole.run()
    trainer(tmp_path / "cut")._save()
    again = trainer(tmp_path / "cut")
    again.run(resume=True)
    for name, array in whole._arrays.items():
        assert np.array_equal(array, again._arrays[name]), name


# ---- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_finds_the_same_directions_and_ranks_and_reads_what_is_written(rslora, tmp_path):
    """PEFT computes in float32; with twice as many random directions as a layer is wide its SVD is exact up to that."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from test_peers_peft import IDS, peer, peer_logits

    rng = np.random.default_rng(3)
    data = [rng.integers(0, 40, (4, 16)).astype("i4") for _ in range(4)]
    settings = {"r": 6, "lora_alpha": 9, "use_rslora": rslora, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(
        peer("llama", tmp_path),
        peft.LoraConfig(**settings, init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.9), task_type="CAUSAL_LM"),
    )
    loader = [{"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.ones(ids.shape)} for ids in data]
    peft.initialize_lora_eva_weights(theirs, loader, show_progress_bar=False)

    model = tiny.model()
    adapter = sites.attach(model, "eva", {"r": 6, "alpha": 9, "rslora": rslora, "tau": 0.9, "targets": "all-linear"})
    found = directions.explore(
        (next(survey_of(model, adapter, ids)) for _ in range(50) for ids in data),
        {layer.site.name: 6 for layer in adapter.layers},
        2.0,
        0.9,
    )
    ranks: dict[float, list[tuple[int, int]]] = {}  # of layers that read the same, which of two is first is open
    for name, ours in found.items():
        A = theirs.get_parameter(f"base_model.model.{name}.lora_A.default.weight").detach().numpy()
        both = min(len(ours), len(A))
        assert np.allclose(ours[:both], A[:both], rtol=0, atol=1e-4), name
        ranks.setdefault(ours[0, 0], []).append((len(ours), len(A)))
    for group in ranks.values():
        ours, others = zip(*group, strict=True)
        assert sorted(ours) == sorted(others)
    for number, layer in enumerate(list(adapter.layers)):
        survey._put(model, adapter, [layer], {layer.site.name: chosen(found[layer.site.name], layer, number)})
    adapters.save(tmp_path / "adapter", model)
    read = peft.PeftModel.from_pretrained(peer("llama", tmp_path), tmp_path / "adapter").double().eval()
    want = model(IDS).data
    assert np.allclose(peer_logits(read).detach().numpy(), want, rtol=0, atol=1e-6 * abs(want).max())
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny.model()
    adapters.load(again, tmp_path / "theirs")
    want = again(IDS).data
    assert np.allclose(peer_logits(theirs).detach().numpy(), want, rtol=0, atol=1e-6 * abs(want).max())


def survey_of(model, adapter, ids):
    """What layers read of these tokens, as Survey.inputs has it."""
    data = Batches(examples(), 8, 32)
    data.at = lambda step: tiny.Batch(ids, np.zeros_like(ids))
    return survey.Survey(model, adapter, data, SETTINGS, 0).inputs(adapter.sites, 1)


def chosen(A, layer, number):
    B = np.random.default_rng(number).normal(size=(layer.site.shape[0], len(A)))
    return {"A": A, "B": 0.1 * B} if len(A) else None
