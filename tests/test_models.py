"""The models on their own, without a peer: gradients of everything, packing, padding, and the cache of generation."""

from itertools import pairwise

import numpy as np
import pytest
import tiny

from refpeft import fused, sites
from refpeft.batches import Batch
from refpeft.errors import RefpeftError
from refpeft.models import rope
from refpeft.models.base import Cache
from refpeft.tensor import no_grad

CONFIGS = tiny.CONFIGS | {
    "mistral": tiny.LLAMA | {"model_type": "mistral", "sliding_window": 4},
    "qwen3": tiny.LLAMA | {"model_type": "qwen3", "head_dim": 8},
    "smollm3": tiny.TIED_LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": None},
    "biases": tiny.LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
}
METHODS = [None, "lora", "prompt_tuning", "prefix_tuning"]
CLOSE = 1e-12


@pytest.fixture(autouse=True)
def _configs(monkeypatch):
    monkeypatch.setattr(tiny, "CONFIGS", CONFIGS)


def built(name: str, *methods: str | None):
    """The tiny model in float64 with these methods, whose values are random."""
    model = tiny.model(name)
    for method in filter(None, methods):
        sites.attach(model, method, {"tokens": 3} if method.endswith("_tuning") else None)
        tiny.scramble(model.adapters[-1])
    return model


def far(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_all_weights_are_the_finite_differences(name):
    model, batch, step = tiny.model(name), tiny.batch(), 1e-5
    sites.attach(model, "full")
    rng = np.random.default_rng(3)
    errors = {}
    for key, grad in tiny.gradients(model, batch).items():
        tensor, direction = model.adapters[0].params[key], rng.standard_normal(grad.shape)
        start, losses = tensor.data, []
        for h in (step, -step):
            tensor.data = start + h * direction
            losses.append(float(model.loss(batch).data))
        tensor.data = start
        difference = (losses[0] - losses[1]) / (2 * step)
        errors[key] = abs(difference - (grad * direction).sum()) / max(abs(difference), np.linalg.norm(grad))
    assert len(errors) >= 18 and max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_the_logits_at_supervised_positions(name):
    model, batch = tiny.model(name), tiny.batch()
    logits = model(batch.ids).data
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -sum(log_p[b, t, batch.targets[b, t]] for b, t in np.argwhere(batch.targets >= 0))
    assert abs(float(model.loss(batch, 1.0).data) / expected - 1) < CLOSE
    assert abs(float(model.loss(batch).data) * batch.supervised / expected - 1) < CLOSE


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_a_trained_head_gives_the_same_loss_in_chunks(name, monkeypatch):
    plain = float(tiny.model(name).loss(tiny.batch()).data)
    model = tiny.model(name)
    sites.attach(model, "full")
    whole = tiny.gradients(model, tiny.batch())
    monkeypatch.setattr("refpeft.fused.LOGITS_AT_ONCE", 3 * 40)
    assert abs(float(model.loss(tiny.batch()).data) / plain - 1) < CLOSE
    chunked = tiny.gradients(model, tiny.batch())
    assert max(far(chunked[key], value) for key, value in whole.items()) < CLOSE


def test_dropout_in_a_head_that_is_given_chunks_differs_between_them_and_is_the_same_again_in_backward(monkeypatch):
    model, masks, dropout = tiny.model(), [], fused.dropout

    def watched(x, **options):
        y = dropout(x, **options)
        masks.append(tuple((y.data == 0).reshape(-1).tolist()))
        return y

    monkeypatch.setattr(fused, "dropout", watched)
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 3 * 40)
    sites.attach(model, "lora", {"targets": ["lm_head"], "dropout": 0.5})
    model.mode.training = True
    model.loss(tiny.batch()).backward()
    forward, backward = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert len(set(forward)) == len(forward) > 2
    assert set(backward) == set(forward)


def test_a_batch_without_a_target_has_no_loss_and_no_gradient():
    for method in ("lora", "full"):
        model = built("llama", method)
        batch = tiny.batch()
        grads = tiny.gradients(model, Batch(batch.ids, np.full_like(batch.targets, -100)))
        assert not any(grad.any() for grad in grads.values() if grad is not None)


# ---- packing and padding ---------------------------------------------------------------------------------------------

LENGTHS = (4, 3, 2)  # documents of a packed row, and one token of padding


def packed() -> tuple[Batch, list[Batch]]:
    """Three documents in one row, and each in a row of its own."""
    ids = tiny.ids(1, sum(LENGTHS) + 1)
    starts = np.cumsum([0, *LENGTHS])
    targets = np.roll(ids, -1, axis=1)
    targets[:, starts[1:] - 1] = -100  # the last of a document predicts nothing
    targets[:, -1] = -100
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 1)])[None].astype("i4")
    segments = np.repeat([0, 1, 2, -1], [*LENGTHS, 1])[None].astype("i4")
    parts = [slice(a, b) for a, b in pairwise(starts)]
    return Batch(ids, targets, positions, segments), [Batch(ids[:, p], targets[:, p]) for p in parts]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_have_the_logits_that_they_have_alone(name, method):
    model, (row, alone) = built(name, method), packed()
    logits = model(row.ids, row.positions, row.segments).data
    at = 0
    for one in alone:
        n = one.ids.shape[1]
        assert far(logits[:, at : at + n], model(one.ids).data) < CLOSE
        at += n


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_row_has_the_loss_and_the_gradients_of_its_documents(name, method):
    model, (row, alone) = built(name, method), packed()
    together = tiny.gradients(model, row)
    losses = [model.loss(one, row.supervised) for one in alone]
    assert abs(sum(float(loss.data) for loss in losses) / float(model.loss(row).data) - 1) < CLOSE
    for tensor in model.adapters[0].params.values():
        tensor.node.grad = None
    for loss in losses:
        loss.backward()
    for key, tensor in model.adapters[0].params.items():
        assert far(together[key], tensor.grad) < CLOSE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_padded_on_the_right_have_the_logits_that_they_have_alone(name, method):
    model, ids, lengths = built(name, method), tiny.ids(3, 8), (8, 5, 1)
    segments = np.where(np.arange(8) < np.array(lengths)[:, None], 0, -1)
    logits = model(ids, None, segments).data
    for row, n in enumerate(lengths):
        assert far(logits[row : row + 1, :n], model(ids[row : row + 1, :n]).data) < CLOSE


def test_what_padding_holds_is_of_no_matter():
    model, (row, _) = built("llama", "lora"), packed()
    ids = row.ids.copy()
    ids[:, -1] = 7
    a, b = (tiny.gradients(model, Batch(one, *(row.targets, row.positions, row.segments))) for one in (row.ids, ids))
    assert all(np.array_equal(a[key], b[key]) for key in a)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "both"])
@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_the_logits_are_those_of_the_whole(name, method):
    model, ids = built(name, *(METHODS[2:] if method == "both" else [method])), tiny.ids(2, 11)
    whole = model(ids).data
    cache, at, parts = Cache(), 0, []
    with no_grad():
        for n in (5, 1, 1, 3, 1):
            parts.append(model(ids[:, at : at + n], cache=cache).data)
            at += n
    assert cache.tokens == 11
    assert far(np.concatenate(parts, axis=1), whole) < CLOSE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_padded_on_the_left_have_the_logits_that_they_have_alone(name, method):
    model, ids, lengths, prompt = built(name, method), tiny.ids(2, 9), np.array([6, 4]), 6
    before = prompt - lengths
    rows = np.zeros((2, 9), "i4")
    segments = np.where(np.arange(9) < before[:, None], -1, 0)
    for row, n in enumerate(before):
        rows[row, n:] = ids[row, : 9 - n]
    positions = np.maximum(np.arange(9) - before[:, None], 0)
    cache, parts = Cache(), []
    with no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            parts.append(model(rows[:, start:stop], positions[:, start:stop], segments[:, :stop], cache).data)
    logits = np.concatenate(parts, axis=1)
    for row, n in enumerate(before):
        assert far(logits[row : row + 1, n:], model(ids[row : row + 1, : 9 - n]).data) < CLOSE


def test_the_last_position_alone_is_the_last_of_all():
    model, ids = built("llama", "prompt_tuning"), tiny.ids()
    assert far(model(ids, last=True).data, model(ids).data[:, -1:]) < CLOSE


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_dynamic_rope_scaling_counts_what_stands_before_the_text(method, monkeypatch):
    scaling = {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    monkeypatch.setitem(CONFIGS, "dynamic", tiny.LLAMA | scaling)
    lengths, plain = [], rope.frequencies
    monkeypatch.setattr(rope, "frequencies", lambda *args: lengths.append(args[-1]) or plain(*args))
    model, cache = built("dynamic", method), Cache()
    with no_grad():
        model(tiny.ids(1, 6))
        model(tiny.ids(1, 6), cache=cache)
        model(tiny.ids(1, 1), cache=cache)
    assert lengths == [9, 9, 10]


@pytest.mark.parametrize("ids", [[[40]], [[-1]], [[0.5]], [3], np.zeros((1, 0), int)])
def test_ids_that_are_not_the_models_are_an_error(ids):
    with pytest.raises(
        RefpeftError, match=r"^token (40|-1) is not among the model's 40|^ids are .*: expected integers"
    ):
        built("llama")(ids)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gpt2_has_as_many_positions_as_it_has(method):
    model = built("gpt2", method)
    room = 64 - (3 if method in METHODS[2:] else 0)
    model(tiny.ids(1, room))
    with pytest.raises(RefpeftError, match=r"^65 positions were asked for: this model has 64"):
        model(tiny.ids(1, room + 1))
    cache = Cache()
    with no_grad():
        model(tiny.ids(1, room), cache=cache)
        with pytest.raises(RefpeftError, match=r"^65 positions were asked for: this model has 64"):
            model(tiny.ids(1, 1), cache=cache)
