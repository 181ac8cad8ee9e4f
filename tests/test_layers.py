"""What hooks are given at a site: what sites hand on, the layers beside, own rows, attention for sub-networks."""

import numpy as np
import pytest
import tiny

from refpeft import fused, ops, sites
from refpeft.errors import RefpeftError
from refpeft.generate import generate
from refpeft.layers import Mode, Train
from refpeft.learning import refuse_recomputation
from refpeft.models.base import Cache
from refpeft.tensor import Tensor, no_grad


def gain(site):
    return {"s": np.ones(1)}


def test_a_memo_goes_from_site_to_site_and_lasts_one_pass(registered):
    seen = []

    def peft_block(x, base, p, site, memo):
        memo.names = [*getattr(memo, "names", []), site.name]
        seen.append(list(memo.names))
        return base(x) * p.s

    model = tiny.model()
    sites.attach(model, registered(targets=("@block_out",), peft_params=gain, peft_block=peft_block))
    for _ in range(2):
        model(tiny.ids())
    layers = ["model.layers.0.block_out", "model.layers.1.block_out"]
    assert seen == [layers[:1], layers] * 2


def test_a_memo_is_empty_again_after_a_pass_that_failed(registered):
    def peft_block(x, base, p, memo):
        assert not vars(memo)
        memo.x = x
        raise RefpeftError("on purpose")

    model = tiny.model()
    sites.attach(model, registered(targets=("0.block_out",), peft_params=gain, peft_block=peft_block))
    for _ in range(2):
        with pytest.raises(RefpeftError, match="on purpose"):
            model(tiny.ids())


def test_what_hands_something_on_cannot_be_computed_again(registered):
    def peft_block(x, base, p, memo):
        return base(x) * p.s

    model = tiny.model()
    sites.attach(model, registered(targets=("@block_out",), peft_params=gain, peft_block=peft_block))
    with pytest.raises(RefpeftError, match=r"checkpoint_activations .* made_here hands on .*: leave it out"):
        refuse_recomputation(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_near_are_the_projections_of_the_same_layer_with_what_is_attached_to_them(family, registered):
    found = {}

    def peft_attention(q, k, v, base, p, near, site):
        x = sites.Tensor(np.random.default_rng(3).standard_normal((1, 2, 24)))
        found[site.index] = [near(role, x).data for role in "qkv"]
        return base(q, k, v) * p.s

    model = tiny.model(family)
    tiny.scramble(sites.attach(model, "lora", {"targets": ["@v"]}))
    sites.attach(model, registered(targets=("@attend",), peft_params=gain, peft_attention=peft_attention))
    model(tiny.ids())
    x = sites.Tensor(np.random.default_rng(3).standard_normal((1, 2, 24)))
    for index, layer in enumerate(model.layers):
        whole = [layer.qkv(x).data] if family == "gpt2" else [f(x).data for f in (layer.q, layer.k, layer.v)]
        assert np.array_equal(np.concatenate(found[index], axis=-1), np.concatenate(whole, axis=-1))


def test_a_role_that_the_layer_does_not_have_is_named(registered):
    def peft_attention(q, k, v, base, p, near):
        return base(q, k, v) * near("gate", q)

    model = tiny.model("gpt2")
    sites.attach(model, registered(targets=("@attend",), peft_params=gain, peft_attention=peft_attention))
    with pytest.raises(RefpeftError, match="this model's layers have no 'gate', but q, k, v, attend, o, up, down"):
        model(tiny.ids())


def test_a_method_knows_its_own_rows_among_those_of_others(registered):
    seen = []

    def peft_embedding(ids, base, p):
        h = base(ids)
        return ops.concat(h[:, :2] * p.s, h, axis=1)

    def peft_block(x, base, p, behind):
        seen.append((x.shape[1], behind))
        return base(x) * p.s

    model = tiny.model()
    sites.attach(model, "prompt_tuning", {"tokens": 3})
    hooks = {"peft_params": gain, "peft_embedding": peft_embedding, "peft_block": peft_block}
    sites.attach(model, registered(targets=("@embed", "0.block_out"), **hooks))
    sites.attach(model, "prompt_tuning", {"tokens": 1})
    model(tiny.ids(2, 5))
    assert seen == [(1 + 2 + 3 + 5, 3 + 5)]
    generate(model, [[1, 2, 3, 4, 5]], 2)
    assert seen[1:] == [(1 + 2 + 3 + 5, 3 + 5), (1, 3 + 1)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "smollm3"])
def test_attention_of_a_sub_network_is_the_models_own_and_remembers_in_generation(family, registered, monkeypatch):
    """With the model's q, k and v as those of the sub-network, it gives what the model's attention gives."""
    no_rope = {"model_type": "smollm3", "no_rope_layers": [0, 1], "pad_token_id": None}
    monkeypatch.setitem(tiny.CONFIGS, "smollm3", tiny.TIED_LLAMA | no_rope)
    found = []

    def peft_block(x, base, p, near, site):
        batch, time, dim = x.shape
        heads = (a.reshape(batch, time, -1, 6).transpose(0, 2, 1, 3) for a in (near(role, x) for role in "qkv"))
        found.append(base.attention(*heads).transpose(0, 2, 1, 3).reshape(batch, time, dim).data)
        return base(x) * p.s

    model = tiny.model(family)
    adapter = sites.attach(model, registered(targets=("0.block_out",), peft_params=gain, peft_block=peft_block))
    wanted, o = [], model.layers[0].o
    inner = o.base
    o.base = lambda x, **rest: (wanted.append(x.data), inner(x, **rest))[1]
    o.compose()
    norm = model.layers[0].norm1
    norm.base = lambda x, **rest: x  # so that the layer attends to x itself
    norm.compose()
    ids = tiny.ids(2, 7)
    segments = np.where(np.arange(7) < [[7], [5]], 0, -1).astype("i4")
    model(ids, segments=segments)
    assert np.allclose(found[-1], wanted[-1], rtol=1e-12)
    with no_grad():
        cache = Cache()
        for at in (slice(0, 4), slice(4, 5), slice(5, 7)):
            model(ids[:1, at], cache=cache)
            assert np.allclose(found[-1], wanted[-1], rtol=1e-12)
    own = {key for key in cache.layers if isinstance(key, tuple)}
    assert own == {(adapter.name, "made_here", adapter.sites[0].name)}


def test_thinner_heads_have_every_nth_frequency_of_the_models(registered, monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "llama", tiny.LLAMA | {"hidden_size": 32})  # heads of 8: four frequencies
    turned = []
    rope = fused.rope
    monkeypatch.setattr(
        fused, "rope", lambda x, cos, sin: turned.append((x.shape[-1], cos)) or rope(x, cos=cos, sin=sin)
    )

    def peft_block(x, base, p):
        q = x[..., :4].reshape(*x.shape[:2], 1, 4).transpose(0, 2, 1, 3)
        return base(x) * p.s + base.attention(q, q, q).sum()

    model = tiny.model()
    sites.attach(model, registered(targets=("0.block_out",), peft_params=gain, peft_block=peft_block))
    model(tiny.ids())
    whole = next(cos for width, cos in turned if width == 8)
    for thin in (cos for width, cos in turned if width == 4):
        assert np.array_equal(thin, whole[..., [0, 2]])


def test_heads_that_do_not_divide_the_models_are_an_error(registered):
    def peft_block(x, base, p):
        q = x.reshape(*x.shape[:2], 6, 4).transpose(0, 2, 1, 3)
        return base(x) * p.s + base.attention(q, q, q).sum()

    model = tiny.model()
    sites.attach(model, registered(targets=("0.block_out",), peft_params=gain, peft_block=peft_block))
    with pytest.raises(RefpeftError, match="heads of 4 numbers do not divide the model's"):
        model(tiny.ids())


def test_draws_are_one_for_all_sites_or_one_for_each_and_anew_in_every_pass(registered):
    seen = []

    def peft_linear(x, base, p, train):
        seen.append((train.draw(1000), train.draw(1000, apart=True)))
        return base(x) * p.s

    model = tiny.model()
    sites.attach(model, registered(peft_params=gain, peft_linear=peft_linear))
    model.mode.training = True
    for model.mode.step, model.mode.again in ((0, 0), (0, 1), (1, 0), (0, 0)):
        model(tiny.ids())
    together, apart = zip(*seen, strict=True)
    assert together[0] == together[1] == together[2] == together[3] != together[4]
    assert len(set(apart[:6])) == 6 and apart[:2] == apart[6:]


def test_every_part_of_a_batch_has_draws_and_masks_of_its_own_and_every_call_too(registered):
    """But the draw that is one for all sites is one for all parts of a step."""
    x = Tensor(np.ones((1, 200)))

    def drawn(site: str = "one", **mode) -> list:
        train = Train(Mode(training=True, **mode), ("adapter", "method", site), (1,), picked=True)
        pair = [[train.draw(1000, apart=True), train.uniform(x).data[0, 0]] for _ in range(2)]
        masks = [train.dropout(x, 0.5).data.tobytes() for _ in range(2)]
        return [train.draw(1000), *(a for a, _ in pair), *(u for _, u in pair), *masks]

    first, others = drawn(), [drawn(part=1), drawn("another"), drawn(again=1)]
    assert first == drawn()
    for other in others:
        assert first[0] == other[0] and len(set(first[1:] + other[1:])) == 12
    chunk = drawn(chunk=1)
    assert chunk[:3] == first[:3] and not set(chunk[3:]) & set(first[3:])


def test_uniform_numbers_of_training_are_the_seeds(registered):
    seen = []

    def peft_linear(x, base, p, train):
        seen.append(train.uniform(p.s).data)
        return base(x) * p.s

    model = tiny.model(dtype="float32")
    sites.attach(model, registered(peft_params=lambda: {"s": np.ones((2, 1))}, peft_linear=peft_linear))
    model.mode.training = True
    for model.mode.step in (0, 0, 1):
        model.layers[0].q(sites.Tensor(np.ones((1, 2, 24), "f4")))
    first, again, other = seen
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.float32 and (first >= 0).all() and (first < 1).all()


def test_a_recipe_brings_its_methods_and_is_what_they_are_together(registered):
    recipe = registered(
        targets=None,
        peft_companions=lambda sites: {
            "lora": {"r": 2, "layers": [max(site.index or 0 for site in sites)]},
            "prefix_tuning": {"tokens": 3},
        },
    )
    model, plain = tiny.model(), tiny.model()
    adapter = sites.attach(model, recipe)
    one = sites.attach(plain, "lora", {"r": 2, "layers": [1]})
    other = sites.attach(plain, "prefix_tuning", {"tokens": 3})
    assert adapter.size == one.size + other.size and adapter.positions == 3
    assert {site.name for site in adapter.sites} == {site.name for site in [*one.sites, *other.sites]}
    together = one.params | other.params
    for name, tensor in adapter.params.items():
        tensor.data[...] = together[name].data
    assert np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)
    sites.detach(model, adapter)
    assert np.array_equal(model(tiny.ids()).data, tiny.model()(tiny.ids()).data)


def test_a_recipe_may_refuse_the_model(registered):
    def peft_check(sites):
        raise RefpeftError(f"{len(sites)} sites are not enough")

    model = tiny.model()
    with pytest.raises(RefpeftError, match=f"{len(model.sites)} sites are not enough"):
        sites.attach(model, registered(targets=None, peft_check=peft_check))
    assert not model.adapters
