"""Heads and objectives without a peer: gradients, plain formulas, first values, what padding changes, wrong tasks."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from test_encoder import CONFIGS as ENCODERS
from test_encoder import rows

import refpeft
from refpeft import files, run, sites
from refpeft.batches import IGNORE, Batch
from refpeft.errors import RefpeftError
from refpeft.models import heads, saving
from refpeft.models.checkpoint import open_checkpoint
from refpeft.quant import make_quantizer

CONFIGS = ENCODERS | {"llama": tiny.LLAMA, "qwen2": tiny.QWEN2, "gpt2": tiny.GPT2_SMALL}
LABELS = ("no", "perhaps", "yes")
HEADED = [
    (family, task)
    for family in CONFIGS
    for task in ("classify", "regress", "tag", "mlm", "embed")
    if family in ENCODERS or task in ("classify", "regress")
]
WEIGHTED = ("classify", "tag", "mlm")
every_head = pytest.mark.parametrize(("family", "task"), HEADED)


def headed(family: str, task: str, seed: int = 0, stored=lambda name: None):
    model = tiny.of(CONFIGS[family])
    heads.put_on(model, task, LABELS if task in ("classify", "tag") else (), seed, stored)
    return model


def asked(family: str, task: str, weighted: bool = False, padded: bool = True) -> Batch:
    """Two rows, the second with padding, and targets as `task` has them."""
    given, rng = rows(family, padded), np.random.default_rng(5)
    ids, real = given["ids"].astype("i4"), given["segments"] >= 0
    targets = np.full(ids.shape, IGNORE, np.int32)
    if task in ("tag", "mlm"):
        targets = np.where(real & (rng.random(ids.shape) < 0.6), rng.integers(0, 3, ids.shape), IGNORE).astype("i4")
    elif task == "embed":
        targets[::2, 0] = 0
    else:
        read = [0, 0] if family in ENCODERS else real.sum(axis=1) - 1
        if task == "regress":
            targets = np.full(ids.shape, np.nan, np.float32)
        targets[[0, 1], read] = [2, 0] if task == "classify" else [0.5, -2.0]
    weights = rng.uniform(0.5, 2, ids.shape).astype("f4") if weighted and task in WEIGHTED else None
    more = {"weights": weights, "rows_each": 2 if task == "embed" else 1}
    return Batch(ids, targets, segments=given["segments"], types=given.get("types"), **more)


def write_base(folder: Path, family: str, more: dict | None = None, **changes) -> Path:
    """The files of the model without a head, and tensors of one."""
    folder.mkdir(exist_ok=True)
    config = CONFIGS[family] | changes
    files.write_json(folder / "config.json", config)
    files.write_safetensors(folder / "model.safetensors", tiny.drawn(config) | (more or {}), {"format": "pt"})
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "[PAD]": 1}, "unk_token": "[UNK]"}
    files.write_json(folder / "tokenizer.json", {"version": "1.0", "model": words, "added_tokens": []})
    files.write_json(folder / "tokenizer_config.json", {"pad_token": "[PAD]"})
    return folder


def every_trained(model, scale: float = 0.3):
    """All weights are trained, and those of the head are no longer close to 0."""
    adapter = sites.attach(model, "full")
    tiny.scramble(adapter, scale=scale)
    return adapter


@every_head
def test_the_gradient_of_everything_is_the_slope_of_the_loss(family, task):
    model, batch = headed(family, task), asked(family, task)
    tiny.assert_slope(every_trained(model, 0.1), lambda: model.loss(batch))


@every_head
def test_the_loss_is_the_formula_of_what_the_model_says(family, task):
    model, batch = headed(family, task), asked(family, task, weighted=True)
    every_trained(model)
    given = {"segments": batch.segments} | ({} if batch.types is None or task == "embed" else {"types": batch.types})
    said = model(batch.ids, **given).data
    if task == "embed":
        expected = 0.0  # one pair: there is no other to be told from
    elif task == "regress":
        expected = ((said[:, 0] - [0.5, -2.0]) ** 2).mean()
    else:
        log_p = said - np.log(np.exp(said).sum(axis=-1, keepdims=True))
        at = np.argwhere(batch.targets >= 0)
        where = [(b, t) if said.ndim == 3 else (b,) for b, t in at]
        losses = [-log_p[place][batch.targets[b, t]] for place, (b, t) in zip(where, at, strict=True)]
        weights = [batch.weights[b, t] for b, t in at]
        expected = np.dot(losses, weights) / np.sum(weights, dtype="f8")
    assert float(model.loss(batch).data) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("task", ["tag", "mlm"])
def test_chunks_of_a_trained_heads_loss_change_nothing_but_which_values_dropout_takes(task, monkeypatch):
    batch, found = asked("bert", task, weighted=True), []
    for at_once in (1000, 3, 1):
        model = headed("bert", task)
        monkeypatch.setattr("refpeft.fused.LOGITS_AT_ONCE", at_once * model.head.shape[0])
        every_trained(model)
        found.append((float(model.loss(batch).data), tiny.gradients(model, batch)))
    (loss, gradients), *others = found
    for same, more in others:
        assert same == pytest.approx(loss, rel=1e-12)
        assert all(np.allclose(more[name], gradient, rtol=1e-9, atol=1e-13) for name, gradient in gradients.items())
    seen = []
    forward = type(model.head).as_computed

    def noted(site, *arguments, **more):
        if site is model.head:
            seen.append(model.mode.chunk)
        return forward(site, *arguments, **more)

    monkeypatch.setattr(type(model.head), "as_computed", noted)
    model.loss(batch).backward()
    count = len(batch.asked)
    assert seen == [*range(count), *reversed(range(count))] and model.mode.chunk == 0  # recomputed in the backward pass


@every_head
def test_a_frozen_head_has_the_loss_and_the_gradients_of_a_trained_one(family, task):
    batch, found = asked(family, task, weighted=True), []
    for frozen in (True, False):
        model = headed(family, task)
        if frozen:
            model.trained_head = ()
        inside = [name for name, site in model.sites.items() if site.home and site.kind == "linear"]
        tiny.scramble(sites.attach(model, "lora", {"targets": inside, "r": 2}), seed=6)
        if not frozen:
            for layer in model.adapters[0].layers:
                if layer.part.name == "full":
                    layer.values["weight"].data[...] = layer.site.weight()
                    if layer.site.bias is not None:
                        layer.values["bias"].data[...] = layer.site.bias
        found.append((float(model.loss(batch).data), tiny.gradients(model, batch)))
    (loss, gradients), (same, more) = found
    assert loss == pytest.approx(same, rel=1e-13)
    for name, gradient in gradients.items():
        assert np.allclose(gradient, more[name], rtol=1e-10, atol=1e-14), name


# ---- vectors of texts ------------------------------------------------------------------------------------------------


def pairs(scores=None) -> Batch:
    """Three pairs of texts of several lengths, with or without scores."""
    rng, lengths = np.random.default_rng(7), np.array([5, 3, 6, 2, 4, 4])
    segments = np.where(np.arange(6) < lengths[:, None], 0, -1).astype("i4")
    targets = np.full((6, 6), IGNORE if scores is None else np.nan, "i4" if scores is None else "f4")
    targets[::2, 0] = 0 if scores is None else scores
    return Batch(rng.integers(3, 40, (6, 6)).astype("i4"), targets, segments=segments, rows_each=2)


def test_vectors_are_means_over_real_tokens_of_norm_one():
    batch, plain = pairs(), tiny.of(CONFIGS["bert"])
    hidden = plain(batch.ids, segments=batch.segments).data
    means = np.stack([row[here >= 0].mean(axis=0) for row, here in zip(hidden, batch.segments, strict=True)])
    found = headed("bert", "embed")(batch.ids, segments=batch.segments).data
    assert np.allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-13)


@pytest.mark.parametrize("scores", [None, (0.9, -0.2, 0.4)])
def test_similarity_is_learned_from_scores_and_from_the_other_pairs_of_a_batch(scores):
    model, batch = headed("roberta", "embed"), pairs(scores)
    adapter = every_trained(model, 0.1)
    vectors = model(batch.ids, segments=batch.segments).data
    cosines = vectors[::2] @ vectors[1::2].T
    if scores is None:
        expected = -(20 * cosines - np.log(np.exp(20 * cosines).sum(axis=1, keepdims=True))).diagonal().mean()
    else:
        expected = ((cosines.diagonal() - np.float32(scores)) ** 2).mean()
    assert float(model.loss(batch).data) == pytest.approx(expected, rel=1e-12)
    tiny.assert_slope(adapter, lambda: model.loss(batch))


def test_texts_without_a_partner_have_no_similarity():
    with pytest.raises(RefpeftError, match="similarity is learned from pairs of texts: rows of text_a and text_b"):
        headed("bert", "embed").loss(asked("bert", "tag"))


# ---- what is there, and what is new ----------------------------------------------------------------------------------

NEW = {
    ("bert", "classify"): {"bert.pooler.dense", "classifier"},
    ("roberta", "classify"): {"classifier.dense", "classifier.out_proj"},
    ("distilbert", "regress"): {"pre_classifier", "classifier"},
    ("deberta-v3", "classify"): {"pooler.dense", "classifier"},
    ("albert", "classify"): {"albert.pooler", "classifier"},
    ("bert", "tag"): {"classifier"},
    ("bert", "mlm"): {"cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"},
    ("bert", "embed"): set(),
    ("llama", "classify"): {"score"},
}


@pytest.mark.parametrize(("family", "task"), NEW)
def test_what_the_checkpoint_lacks_is_trained_beside_any_method(family, task):
    model = headed(family, task)
    assert set(model.trained_head) == NEW[family, task]
    inside = next(name for name, site in model.sites.items() if site.home and site.kind == "linear")
    adapter = sites.attach(model, "lora", {"targets": [inside], "r": 2})
    trained = {name.rpartition(".")[0] for name in adapter.params}
    assert trained == NEW[family, task] | {inside}
    second = sites.attach(model, "ia3", {"targets": [inside], "feedforward": []})
    assert {name.rpartition(".")[0] for name in second.params} == {inside}  # the head is trained once


def test_methods_leave_the_head_alone_that_is_trained_in_full():
    model = headed("distilbert", "classify")
    lora = sites.attach(model, "lora", {"targets": ["*"], "r": 2})
    assert not [name for name in lora.params if name.startswith(("classifier.lora", "pre_classifier.A"))]
    assert {name for name in lora.params if "classifier" in name} == {
        f"{name}.{part}" for name in ("classifier", "pre_classifier") for part in ("weight", "bias")
    }


@every_head
def test_first_values_come_from_the_seed(family, task):
    first, same, other = (
        {name: dense() for name, dense in headed(family, task, seed).frozen.items()} for seed in (3, 3, 4)
    )
    new = first.keys() - tiny.drawn(CONFIGS[family]).keys()
    assert all(np.array_equal(first[name], same[name]) for name in new)
    for name in new:
        if first[name].ndim == 2:
            assert not np.array_equal(first[name], other[name])
            assert abs(first[name]).max() < 0.1 and first[name].std() == pytest.approx(0.02, rel=0.3)
        else:
            assert (first[name] == ("LayerNorm.weight" in name or "norm.weight" in name)).all()


def test_the_deviation_of_first_values_is_the_configs():
    model = tiny.of(CONFIGS["bert"] | {"initializer_range": 2.0})
    heads.put_on(model, "classify", LABELS)
    assert model.frozen["bert.pooler.dense.weight"]().std() == pytest.approx(2, rel=0.1)


def test_a_classifier_of_other_labels_is_made_anew():
    files = {
        "bert.pooler.dense.weight": np.eye(24),
        "bert.pooler.dense.bias": np.ones(24),
        "classifier.weight": np.ones((2, 24)),
        "classifier.bias": np.ones(2),
    }
    model = headed("bert", "classify", stored=files.get)
    assert model.trained_head == ("classifier",) and model.head.shape == (3, 24)
    assert model.new_head == ("classifier.weight", "classifier.bias")
    assert np.array_equal(model.frozen["bert.pooler.dense.weight"](), np.eye(24))
    assert abs(model.frozen["classifier.weight"]()).max() < 0.1
    two = tiny.of(CONFIGS["bert"])
    heads.put_on(two, "classify", ("a", "b"), 0, files.get)
    assert np.array_equal(two.frozen["classifier.weight"](), np.ones((2, 24))) and two.new_head == ()


def test_what_is_new_of_a_head_is_said(tmp_path):
    names = {"classifier.weight": np.ones((2, 24), "f4"), "classifier.bias": np.ones(2, "f4")}
    model = refpeft.load(write_base(tmp_path, "bert", names), task="tag", labels=LABELS)
    assert "new, for the model's files have none of this shape: classifier.weight, classifier.bias" in "\n".join(
        run._of_task(model, model.checkpoint)
    )


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("llama", None), ("bert", None)])
def test_a_model_that_does_a_task_already_stays_as_it_is(name, task):
    model = tiny.of(CONFIGS[name])
    sites_before, frozen, own = dict(model.sites), dict(model.frozen), model.task
    heads.put_on(model, task)
    assert (model.sites, model.frozen, model.task, model.new_head) == (sites_before, frozen, own, ())


# ---- padding ---------------------------------------------------------------------------------------------------------


@every_head
def test_padding_changes_nothing(family, task):
    model, batch = headed(family, task), asked(family, task)
    every_trained(model)
    given = {"segments": batch.segments} | ({} if batch.types is None else {"types": batch.types})
    whole = model(batch.ids, **given).data
    alone = model(batch.ids[1:, :6], **({} if batch.types is None else {"types": batch.types[1:, :6]})).data
    assert np.allclose(whole[1:, :6] if whole.ndim == 3 else whole[1:], alone, rtol=1e-12, atol=1e-14)


# ---- files -----------------------------------------------------------------------------------------------------------


def merged(folder: Path, family: str, task: str, dtype: str = "float32") -> Path:
    """A directory of the merged model of this head, after a LoRA."""
    labels = LABELS if task in ("classify", "tag") else ()
    model = refpeft.load(write_base(folder / "base", family), dtype="float64", task=task, labels=labels)
    tiny.scramble(sites.attach(model, "lora", {"targets": "all-linear", "r": 2}))
    sites.merge(model)
    saving.save(model, folder / "merged", dtype)
    return folder / "merged"


@pytest.mark.parametrize(("family", "task"), [one for one in HEADED if one[1] != "embed"])
def test_a_merged_model_is_saved_with_its_head_and_knows_its_task_again(family, task, tmp_path):
    labels = LABELS if task in ("classify", "tag") else ()
    model = refpeft.load(write_base(tmp_path / "base", family), dtype="float64", task=task, labels=labels)
    tiny.scramble(sites.attach(model, "lora", {"targets": "all-linear", "r": 2}))
    given = rows(family)
    expected = model(**given).data
    sites.merge(model)
    saving.save(model, tmp_path / "merged")
    again = refpeft.load(tmp_path / "merged", dtype="float64")
    assert (again.task, again.labels, again.new_head) == (task, labels, ())
    assert np.allclose(again(**given).data, expected, rtol=0, atol=2e-5 * abs(expected).max())  # kept in float32


def test_what_a_config_said_of_another_head_does_not_stay(tmp_path):
    base = write_base(tmp_path / "base", "bert", id2label={"0": "x"}, num_labels=7, problem_type="regression")
    model = refpeft.load(base, task="tag", labels=LABELS)
    saving.save(model, tmp_path / "saved")
    config = files.read_json(tmp_path / "saved" / "config.json")
    assert config["architectures"] == ["BertForTokenClassification"] and "problem_type" not in config
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"} and config["num_labels"] == 3
    assert config["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}


@pytest.mark.parametrize(
    ("family", "said", "pad"), [("gpt2", {}, 1), ("gpt2", {"pad_token_id": 0}, 0), ("bert", {}, None)]
)
def test_a_decoder_that_classifies_says_what_padding_is(family, said, pad, tmp_path):
    model = refpeft.load(write_base(tmp_path / "base", family, **said), task="classify", labels=LABELS)
    saving.save(model, tmp_path / "saved")
    assert files.read_json(tmp_path / "saved" / "config.json").get("pad_token_id") == pad


POOLER = {"bert.pooler.dense.weight": np.eye(24, dtype="f4"), "bert.pooler.dense.bias": np.ones(24, "f4")}


def test_what_no_task_took_of_the_files_is_saved_with_a_model_without_a_head(tmp_path):
    model = refpeft.load(write_base(tmp_path / "base", "bert", POOLER), task="embed")
    saving.save(model, tmp_path / "saved")
    found = files.read_safetensors(tmp_path / "saved" / "model.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in POOLER.items())


@pytest.mark.parametrize(
    ("family", "bias"),
    [("bert", "cls.predictions.bias"), ("roberta", "lm_head.bias"), ("albert", "predictions.bias")],
)
def test_a_masked_head_has_its_bias_where_its_family_has_it(family, bias, tmp_path):
    stored = np.arange(40, dtype="f4")
    model = refpeft.load(write_base(tmp_path / "base", family, {bias: stored}), task="mlm")
    assert np.array_equal(model.head.bias, stored)
    saving.save(model, tmp_path / "saved")
    found = files.read_safetensors(tmp_path / "saved" / "model.safetensors")
    assert np.array_equal(found[bias], stored) and not [name for name in found if name.endswith("decoder.bias")]


@pytest.mark.parametrize("quantizer", ["nf4", "int8", "int4"])
def test_a_quantized_model_keeps_its_head_as_it_was(quantizer, tmp_path):
    chosen = make_quantizer(quantizer, None, False)
    base = merged(tmp_path, "bert", "classify")
    saving.quantize(open_checkpoint(base), tmp_path / "small", chosen)
    packed, same = (refpeft.load(tmp_path / "small"), refpeft.load(base, quantizer=quantizer))
    assert packed.bits < 10 and packed.task == "classify" and packed.labels == LABELS and packed.new_head == ()
    assert packed.checkpoint.unused == ()
    assert np.array_equal(packed(**rows("bert")).data, same(**rows("bert")).data)
    saving.save(packed, tmp_path / "again")
    again = refpeft.load(tmp_path / "again")
    assert np.array_equal(again(**rows("bert")).data, same(**rows("bert")).data)
    if quantizer != "int4":
        for folder in ("small", "again"):
            scheme = files.read_json(tmp_path / folder / "config.json")["quantization_config"]
            assert scheme["llm_int8_skip_modules"] == ["lm_head", "classifier", "pooler.dense"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"cls.predictions.decoder.weight": np.ones((40, 24), "f4")},
            "'cls.predictions.decoder.weight' is not the embed",
        ),
        (
            {"cls.predictions.transform.dense.weight": np.ones((288, 1), np.uint8)},
            "'cls.predictions.transform.dense.weight', of the head, is uint8: expected floating-point numbers; take",
        ),
    ],
)
def test_a_head_that_is_not_computed_so_is_refused(tensors, message, tmp_path):
    write_base(tmp_path, "bert", tensors)
    with pytest.raises(RefpeftError, match=message):
        refpeft.load(tmp_path, task="mlm")


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task", "labels", "message"),
    [
        ("llama", "tag", LABELS, "task 'tag' is none for llama, which is made for causal-lm, classify, regress"),
        ("bert", "causal-lm", (), "task 'causal-lm' is none for bert, which is made for classify, regress, tag, mlm,"),
        ("bert", "sort", (), "task 'sort' is none for bert"),
        ("bert", "classify", (), "task 'classify' tells labels apart, and there are 0: name at least two"),
        ("bert", "tag", ("x",), "task 'tag' tells labels apart, and there are 1: name at least two"),
    ],
)
def test_a_task_that_a_model_cannot_do_is_refused(family, task, labels, message):
    with pytest.raises(RefpeftError, match=message):
        heads.put_on(tiny.of(CONFIGS[family]), task, labels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"id2label": {"one": "a"}}, "config key id2label: expected names by number"),
        ({"id2label": {"0": "a", "2": "b"}}, r"config key id2label names the numbers \[0, 2\]: expected 0, 1, 2, ..."),
    ],
)
def test_names_of_labels_that_are_none_are_refused(more, message):
    with pytest.raises(RefpeftError, match=message):
        heads.read_from({"architectures": ["BertForTokenClassification"]} | more)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_several_labels_or_numbers_of_one_text_are_refused(kind):
    config = {"architectures": ["BertForSequenceClassification"], "num_labels": 3, "problem_type": kind}
    with pytest.raises(
        RefpeftError, match=f"problem_type is '{kind}' with 3 labels: refpeft has one label, or one num"
    ):
        heads.read_from(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertModel"]}, (None, ())),
        ({}, (None, ())),
        ({"architectures": ["BertForMaskedLM"], "id2label": {"0": "a"}}, ("mlm", ())),
        ({"architectures": ["BertForSequenceClassification"]}, ("classify", ("LABEL_0", "LABEL_1"))),
        ({"architectures": "BertForSequenceClassification", "num_labels": 1}, ("regress", ())),
        ({"architectures": ["XForTokenClassification"], "id2label": {"1": "b", "0": "a"}}, ("tag", ("a", "b"))),
        (
            {"architectures": ["XForSequenceClassification"], "num_labels": 1, "problem_type": "regression"},
            ("regress", ()),
        ),
    ],
)
def test_a_config_says_what_a_model_is_for(config, expected):
    assert heads.read_from(config) == expected
