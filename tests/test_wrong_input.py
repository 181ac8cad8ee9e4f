"""What does not fit, or has no effect: an error or a warning that says what would do, never silence."""

import warnings

import pytest
import tiny
from click.testing import CliRunner
from variants import quantizer

from refpeft import manager, sites
from refpeft.cli import main
from refpeft.errors import RefpeftError, RefpeftWarning
from refpeft.layers import INPUTS
from refpeft.lowrank import Ranked
from refpeft.quant import make_quantizer

FORWARD = {f"peft_{kind}" for kind in INPUTS}
METHODS = sorted(name for name, listing in manager.catalogue().items() if FORWARD & set(listing.hooks))
"""Recipes bring methods along, which look at what they are given."""
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def attach(method: str, options: dict, family: str = "llama") -> sites.Adapter:
    """The method on a tiny model, of NF4 weights where it is about them."""
    return sites.attach(tiny.model(family, quantizer=quantizer() if method == "loftq" else None), method, options)


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "hira", "delora", "vblora"])
def test_a_rank_above_the_smaller_side_is_a_warning_with_one_that_will_do(method):
    fitting = {"vector_length": 6} if method == "vblora" else {}
    with pytest.warns(RefpeftWarning) as caught:
        attach(method, {"r": 25} | fitting)
    (said,) = caught
    assert str(said.message).startswith(
        f"{method}: r is 25, but above 12 a product has no higher rank at {V}, which is"
    )
    assert str(said.message).endswith("(12, 24): take 12 or less")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(method, {"r": 12} | fitting)


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
def test_a_rank_that_first_values_cannot_have_is_an_error_with_one_that_will_do(method):
    with pytest.raises(RefpeftError, match=rf"{method}: r is 25, but above 12 .* at {V}, which is .*: take 12 or less"):
        attach(method, {"r": 25})
    attach(method, {"r": 12})


def test_the_rank_of_a_pattern_is_looked_at_where_it_holds():
    with pytest.warns(RefpeftWarning, match=rf"lora: r is 13, but above 12 .* at {V}"):
        attach("lora", {"rank_pattern": {"v_proj": 13}})
    with pytest.raises(RefpeftError, match=rf"pissa: r is 30, but above 24 .* at {Q}"):
        attach("pissa", {"rank_pattern": {"q_proj": 30}})


def test_a_rank_at_which_lokr_keeps_its_second_factor_whole_is_a_warning():
    with pytest.warns(RefpeftWarning, match=rf"lokr: r is 3, but above 2 D stays whole, and r only scales, at {Q}"):
        attach("lokr", {"r": 3})


@pytest.mark.parametrize("method", ["compacter", "compacter_pp"])
def test_a_rank_above_the_smaller_side_of_a_kronecker_factor_is_a_warning(method):
    with pytest.warns(RefpeftWarning, match="rank is 3, but above 2 a product has no higher rank: take 2 or less"):
        attach(method, {"size": 8, "rank": 3})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("randlora", {"r": 13}, rf"r is 13, more than a side of {V}, which is \(12, 24\): take 12 or less"),
        ("hra", {"r": 26}, f"r is 26, more than the 24 inputs of {Q}"),
        ("miss", {"r": 25}, f"r is 25, more than the 24 inputs of {Q}"),
        ("shira", {"r": 30}, rf"r is 30.*{Q}"),
    ],
)
def test_sizes_like_ranks_have_bounds_of_their_own(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        attach(method, options)


def test_a_method_with_a_rank_is_ranked_or_has_a_check_of_its_own():
    of_their_own = {"randlora", "hra", "miss", "shira"}  # as above
    of_their_own.add("ladder_side")  # r divides widths: see tests of its own
    of_their_own.add("vera")  # r random directions with a gain each: more of them are not in vain
    for name in METHODS:
        config = getattr(manager.load(name), "Config", None)
        if "r" in getattr(config, "__dataclass_fields__", {}):
            assert issubclass(config, Ranked) != (name in of_their_own), name


# ---- options without an effect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "oft",
            {"block_size": 4, "terms": 6},
            r'\[oft\]: terms has an effect only with cayley = "neumann": set that, or',
        ),
        ("rows", {"rows": [1], "count": 3}, r"\[rows\]: count has an effect only with rows = \[\]"),
        ("adapterdrop", {"robust": False}, "drop is 0: expected 1 or more"),
        ("prompt_tuning", {"ids": [3]}, 'init = "ids" and a list'),
        ("lora", {"alpha": 0}, "alpha is 0: expected a number above 0"),
        ("vera", {"d_initial": 0}, "d_initial other than 0"),
        ("delora", {"lambda_initial": 0}, "lambda_initial other than 0: nothing would be learned"),
        ("delora", {"lambda_pattern": {"q_proj": 0}}, "lambda_initial other than 0"),
        ("krona", {"scale": 0}, "scale other than 0"),
        ("randlora", {"alpha": 0}, "alpha other than 0"),
        ("fourierft", {"scaling": 0}, "scaling other than 0: nothing would be learned"),
        ("parallel", {"scale": 0}, "scale other than 0: nothing would be learned"),
        ("houlsby", {"init_std": 0}, "init_std above 0"),
        ("pfeiffer", {"init_std": -1}, "init_std above 0"),
        ("lora", {"alpha_pattern": {"q_proj": 0}}, "alpha is 0: expected a number above 0"),
        ("ia3", {"targets": ["@k"], "feedforward": ["@down"]}, "feedforward names '@down', which is none of the"),
        ("lora", {"rank_pattern": {"k_proj": 3}}, "has the key 'k_proj', which matches none of the targets"),
        ("lora", {"targets": ["@q", "@qq"]}, "target '@qq' matches no site of this model; did you mean '@q'"),
        ("lora", {"exclude": ["@w"]}, "target '@w' matches no site of this model"),
        ("lora", {"targets": []}, "targets is empty: name at least one"),
        ("lora", {"targets": ["@embed"], "bias": "lora_only"}, "targets is empty"),  # biases of linear targets
        ("lora", {"exclude": ["@q", "@v"]}, "after 'exclude' and 'layers' no site is left"),
    ],
)
def test_an_option_without_an_effect_is_an_error(name, options, message):
    with pytest.raises(RefpeftError, match=message):
        attach(name, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_range": 0.5}, r"\[affine\]: scale_range has an effect only with nested = true"),
        ({"zero_range": 0.5}, r"\[affine\]: zero_range has an effect only with nested = true"),
        ({"per": "row", "group": 32}, r'\[affine\]: group has an effect only with per = "group"'),
    ],
)
def test_a_quantizers_option_without_an_effect_is_an_error(options, message):
    with pytest.raises(RefpeftError, match=message):
        make_quantizer("affine", options)
    make_quantizer("affine", {"nested": True, "scale_range": 0.5, "group": 32})


@pytest.mark.parametrize(
    ("method", "options", "family", "message"),
    [
        ("lora", {"targets": ["@embed"], "dropout": 0.1}, "llama", "lora: dropout has no effect at embeddings"),
        ("lora", {"targets": ["@embed"], "init": "gaussian"}, "llama", "lora: init has no effect at embeddings"),
        ("lora", {"targets": ["@embed"], "freeze_A": True}, "llama", "lora: freeze_A has no effect at embeddings"),
        (
            "lora",
            {"targets": ["@q", "@head"], "layers": [0]},
            "llama",
            "target '@head' has no effect: it is in none of",
        ),
        ("lora", {"exclude": ["@k"]}, "llama", "exclude '@k' has no effect: it is none of the targets"),
        (
            "bitfit",
            {"create": True, "targets": ["@q"]},
            "gpt2",
            "bitfit: create has no effect: all linear targets have a bias",
        ),
    ],
)
def test_an_option_that_the_sites_leave_without_an_effect_is_a_warning(method, options, family, message):
    with pytest.warns(RefpeftWarning, match=message):
        attach(method, options, family)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [2, -1])
def test_a_layer_out_of_range_is_an_error(method, number):
    config = getattr(manager.load(method), "Config", None)
    if "layers" not in getattr(config, "__dataclass_fields__", {}):
        pytest.skip("has no option `layers`")
    with pytest.raises(RefpeftError, match=rf"layers names {number}: the model has layers 0 to 1"):
        attach(method, {"layers": [number]})


# ---- from the command line -------------------------------------------------------------------------------------------


def test_the_command_line_prints_a_warning_as_one_line_and_goes_on():
    arguments = ["train", "--dry-run", "--set", "lora.r=300", "--set", 'lora.exclude=["@embed"]']
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    one, two = result.stderr.splitlines()
    assert one == "warning: exclude '@embed' has no effect: it is none of the targets"
    assert two.startswith("warning: lora: r is 300, but above ")


def test_a_sparsity_that_rounds_to_all_weights_keeps_one():
    adapter = sites.attach(tiny.model(), "sparse_adapter", {"size": 1, "sparsity": 0.9999, "prune": "magnitude"})
    assert {int(layer.p.down_mask.data.sum() + layer.p.up_mask.data.sum()) for layer in adapter.layers} == {1}
