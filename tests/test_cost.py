"""What a step keeps and computes, found without weights, is what formulas say and what real steps do."""

import numpy as np
import pytest
import test_encoder
import test_t5
import tiny
from click.testing import CliRunner
from test_memory import frozen, kept

from refpeft import cli, cost, memory, shapes, sites
from refpeft.absent import absent, counted, zeros
from refpeft.tensor import plain


def step(shape: str, method: str | None = "lora", rows: int = 1, tokens: int = 128, **options) -> cost.Step:
    model = memory.skeleton(shapes.checkpoint_of(shape))
    sites.attach(model, method, options or None)
    return cost.step(model, rows, tokens)


def linear_numbers(shape: str) -> int:
    """Numbers of all matrices that a token of a decoder is multiplied with."""
    sites = memory.skeleton(shapes.checkpoint_of(shape)).sites.values()
    return sum(site.shape[0] * site.shape[1] for site in sites if site.kind == "linear")


def attention(layers: int, dim: int, tokens: int) -> float:
    """Operations forward: two products, over pairs of a token and one before it."""
    return 4 * layers * dim * tokens * (tokens + 1) / 2


SHAPES = pytest.mark.parametrize("shape, layers, dim", [("smollm2-135m", 30, 576), ("gpt2", 12, 768)])


@SHAPES
def test_training_all_weights_takes_six_operations_for_each_and_token(shape, layers, dim):
    """2 N forward and 4 N back (arXiv:2001.08361, section 2.1); a trained head's logits twice, as none are kept."""
    found, forward = step(shape, "full"), 2 * 128 * linear_numbers(shape)
    head, pairs = 2 * 128 * dim * shapes.checkpoint_of(shape).config.vocab, attention(layers, dim, 128)
    assert found.forward == pytest.approx(forward + pairs, rel=1e-6)
    assert found.backward == pytest.approx(2 * forward + head + 2.5 * pairs, rel=1e-6)


@SHAPES
def test_frozen_weights_need_no_gradients_which_leaves_two_thirds(shape, layers, dim):
    found = step(shape, "ln_tuning")
    six, pairs = 6 * 128 * linear_numbers(shape), 3.5 * attention(layers, dim, 128)
    assert (found.forward + found.backward - pairs) / six == pytest.approx(2 / 3, rel=1e-6)


def test_what_lies_below_the_first_target_is_not_gone_back_through():
    all_of_it, pairs = step("gpt2"), 2.5 * attention(12, 768, 128)
    upper, head = step("gpt2", layers=(11,)), 2 * 128 * 768 * 50257
    layer = (all_of_it.backward - pairs - head) / 12
    assert upper.backward - pairs - head == pytest.approx(layer, rel=0.25)


def test_rows_add_up_and_attention_grows_with_the_square():
    one, four = step("gpt2"), step("gpt2", rows=4)
    assert four.forward == pytest.approx(4 * one.forward)
    long = step("gpt2", tokens=1024)
    assert long.forward - 8 * one.forward == pytest.approx(attention(12, 768, 1024) - 8 * attention(12, 768, 128))


def test_products_that_a_method_makes_once_a_step_are_counted_once():
    """DoRA's norms need B A as a whole, however many tokens there are."""
    one, five = (step("gpt2", "dora", rows=rows).forward - step("gpt2", rows=rows).forward for rows in (1, 5))
    assert (5 * one - five) / 4 == pytest.approx(12 * 2 * 768 * 2304 * 8)


@pytest.mark.parametrize("shape", ["roberta-base", "deberta-v3-base", "t5-small", "minilm-l6"])
def test_encoders_and_encoder_decoders_have_costs(shape):
    found = step(shape, tokens=64)
    assert found.kept > found.inputs > 0
    assert 0.4 < found.backward / found.forward < 1.2


def test_methods_that_compare_passes_cannot_be_computed_again():
    assert step("gpt2", "adamix").inputs is None


KINDS = tiny.CONFIGS | test_encoder.CONFIGS | {"t5": test_t5.CONFIGS["t5"]}


@pytest.mark.parametrize("targets", [("@q", "@v"), "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_faster_pairs_keep_what_plain_ones_do(kind, targets):
    """The plan of memory measures these. Attention's output may be kept once, for what reads it as well."""
    model = tiny.of(KINDS[kind], dtype="f4")
    sites.attach(model, "lora", {"targets": targets, "r": 8})
    ids = tiny.ids(3, 18)
    said = {"said": ids} if kind == "t5" else {}

    def found() -> int:
        out = model(ids, **said)
        return sum(kept(out, [*frozen(model), *(tensor.data for _, tensor in model.trained())]).values())

    with plain():
        expected = found()
    assert 0.9 * expected <= found() <= 1.02 * expected


# ---- arrays that are not there ---------------------------------------------------------------------------------------


def test_dropout_keeps_what_it_gives_and_not_what_it_reads_and_masks_on_the_host_alone():
    """Of the inputs of seven layers, 576 or 1,536 numbers wide, those of q, gate and down are kept by no others."""

    def kept(narrow: bool, **options) -> float:
        model = memory.skeleton(shapes.checkpoint_of("smollm2-135m"))
        sites.attach(model, "lora", {"targets": "all-linear"} | options)
        return cost.step(model, 1, 128, narrow).kept

    dropped, no_more = 6 * 576 + 1536, 2 * 576 + 1536
    more = {narrow: kept(narrow, dropout=0.1) - kept(narrow) for narrow in (False, True)}
    assert more[True] / (30 * 128) == pytest.approx(2 * (dropped - no_more))
    assert more[False] / (30 * 128) == pytest.approx(4 * (dropped - no_more) + dropped, rel=0.005)


def test_weights_that_are_not_there_are_zeros_to_compute_with():
    weight, x = absent((5, 4)), np.ones((2, 3, 4), np.float32)
    assert np.array_equal(x @ weight.T, np.zeros((2, 3, 5)))
    assert np.array_equal(np.matmul(weight, x[0].T, out=np.ones((5, 3), np.float32)), np.zeros((5, 3)))
    assert np.array_equal(weight + 1, np.ones((5, 4)))
    assert weight.T.strides == (0, 0)


def test_what_is_as_large_as_a_weight_takes_no_room():
    weight = absent((100_000, 50_000))
    row = np.ones(50_000, np.float32)
    for made in (2 * weight, weight @ weight.T, weight * row, weight.copy(), zeros((9999, 9999))):
        assert not any(made.strides)
    assert (weight * weight).sum(axis=1).shape == (100_000,)
    weight += 1
    assert weight.shape == (100_000, 50_000)
    with pytest.raises(MemoryError):
        absent((2**40, 2**30))


def test_products_are_counted_where_one_factor_is_not_there_or_follows_from_it():
    weight, x = absent((5, 4)), np.ones((3, 4), np.float32)
    with counted() as count:
        y = x @ weight.T
        (y + 1) @ np.ones((5, 2), np.float32)
        x @ x.T
    assert count.flops == 2 * 3 * 4 * 5 + 2 * 3 * 5 * 2


# ---- time ------------------------------------------------------------------------------------------------------------


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, ["plan", "--shape", "gpt2", "--length", "64", *arguments])
    return result.stdout + result.stderr


def test_time_is_operations_over_what_a_device_is_taken_to_reach():
    speed = cost.Speed(cost.DEVICES["a100"], device="a100")
    assert speed.seconds(312e12 * 0.4) == pytest.approx(1)
    assert "if it reaches 40% of 312 TFLOP/s (a100's peak in 16 bits, by its data sheet)" in plan("--on", "a100")
    assert "if it reaches 50% of 10 TFLOP/s\n" in plan("--tflops", "10", "--utilisation", "0.5")
    assert "tokens/s" not in plan()


def test_what_cannot_be_a_speed_is_refused():
    assert "--on a10: no device of this name is known; did you mean 'a100'" in plan("--on", "a10")
    assert "--on and --tflops both say" in plan("--on", "a100", "--tflops", "3")
    assert "--utilisation is a share of a device's peak" in plan("--utilisation", "0.3")
    assert "Invalid value for '--utilisation'" in plan("--on", "a100", "--utilisation", "2")
