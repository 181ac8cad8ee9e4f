"""Affine integers: the worked example, the rules of the format, and what its property says of any weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer

EXAMPLE = np.array([0.35, -1.2, 2.7, -0.45], "f4")
F4 = np.dtype("f4")
WAYS = [{"bits": bits, "per": per} for bits in (4, 8) for per in ("tensor", "row", "group")]


def round_trip(weight, group=64, **options):
    """(parts, the dense array again)."""
    if options.get("per", "group") == "group":
        options["group"] = group
    quantizer = make_quantizer("affine", options)
    parts = quantizer.pack(weight)
    return parts, quantizer.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def codes_of(parts):
    if "codes" in parts:
        return parts["codes"].reshape(-1)
    return np.stack((parts["packed"] >> 4, parts["packed"] & 15), axis=-1).reshape(-1)


def test_the_worked_example_of_4_bits():
    parts, back = round_trip(EXAMPLE)
    assert parts["scale"] == pytest.approx(0.26) and parts["zero"].tolist() == [[5]]
    assert codes_of(parts).tolist() == [6, 0, 15, 3]
    assert back == pytest.approx([0.26, -1.3, 2.6, -0.52])


def test_the_worked_example_with_its_constants_in_4_bits():
    """The zero point 5 is 7.5 steps of 10 / 15: a tie, which takes the even 8."""
    parts, back = round_trip(EXAMPLE, nested=True, scale_range=1.0, zero_range=10.0)
    assert parts["constants"].tolist() == [[4 << 4 | 8]] and parts["scale_range"] == 1
    assert codes_of(parts).tolist() == [6, 0, 15, 3]
    assert back == pytest.approx([0.177778, -1.422222, 2.577778, -0.622222], abs=5e-7)


def test_what_nesting_costs_is_the_zero_point():
    errors = {
        name: abs(round_trip(EXAMPLE, **options)[1] - EXAMPLE).mean()
        for name, options in {
            "exact": {},
            "scale": {"nested": True, "scale_range": 1.0},
            "both": {"nested": True, "scale_range": 1.0, "zero_range": 10.0},
        }.items()
    }
    assert errors == pytest.approx({"exact": 0.09, "scale": 0.08333, "both": 0.17222}, abs=1e-5)
    zeros = [round_trip(np.append(EXAMPLE, np.float32(0)), nested=True, zero_range=top)[1][-1] for top in (0.0, 10.0)]
    assert zeros[0] == 0 and abs(zeros[1]) > 0.08  # 0 is no value any more


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_constants_belong_to_what_shares_them(way):
    weight = normal(3, 5, 40) * np.linspace(1, 40, 15).reshape(3, 5, 1).astype("f4")
    parts, back = round_trip(weight, group=16, **way)
    kept = {"tensor": (1, 1), "row": (15, 1), "group": (15, 3)}[way["per"]]
    assert parts["scale"].shape == parts["zero"].shape == kept
    first = {"tensor": weight, "row": weight[0, 0], "group": weight[0, 0, :16]}[way["per"]]
    assert parts["scale"][0, 0] == (first.max() - first.min()) / np.float32(2 ** way["bits"] - 1)
    assert parts["zero"][0, 0] == np.rint(-first.min() / parts["scale"][0, 0])
    assert back.shape == weight.shape


def test_a_range_that_does_not_hold_zero_is_widened_to_it():
    for sign in (1, -1):
        parts, back = round_trip(np.array([3, 15, 0], "f4") * sign)
        assert parts["scale"] == 1 and parts["zero"] == (0 if sign > 0 else 15)
        assert np.array_equal(back, np.array([3, 15, 0]) * sign)


def test_a_tie_takes_the_even_code():
    parts, _ = round_trip(np.array([0, 15, 0.5, 1.5, 2.5, 3.5], "f4"))
    assert codes_of(parts).tolist() == [0, 15, 0, 2, 2, 4]


@pytest.mark.parametrize("way", [*WAYS, {"nested": True}, {"nested": True, "per": "tensor"}], ids=str)
def test_zeros_are_zeros(way):
    for weight in (np.zeros((2, 64), "f4"), normal(4, 64) * np.array([[1], [0], [1], [1]], "f4")):
        back = round_trip(weight, **way)[1]
        assert np.array_equal(back[weight == 0], weight[weight == 0])


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 3), st.just(150))


@given(SHAPES, st.sampled_from(WAYS), st.integers(1, 70), st.sampled_from([1e-30, 0.02, 1e38]), st.integers(0, 99))
def test_any_weight_comes_back_within_half_a_step(shape, way, group, scale, seed):
    weight = np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4") * np.float32(scale)
    parts, back = round_trip(weight, group=group, **way)
    assert back.shape == shape and np.isfinite(back).all()
    step = parts["scale"].max()
    assert (abs(back - weight) <= step * np.float32(0.5 + 2e-5)).all()
    assert (np.sign(back) * np.sign(weight) >= 0).all()


@given(st.sampled_from(WAYS), st.booleans(), st.integers(0, 99))
def test_packing_again_changes_no_code(way, double_quant, seed):
    quantizer = make_quantizer("affine", way, double_quant)
    weight = normal(8, 200, seed=seed)
    once = quantizer.pack(weight)
    twice = quantizer.pack(quantizer.dense(once, weight.shape, F4))
    assert np.array_equal(codes_of(once), codes_of(twice)) and np.array_equal(once["zero"], twice["zero"])


@pytest.mark.parametrize("way", [*WAYS, {"nested": True}, {"nested": True, "scale_range": 1.0}], ids=str)
def test_the_device_makes_the_same_bits(monkeypatch, way):
    quantizer, weight = make_quantizer("affine", way), normal(5, 150)
    here = quantizer.pack(weight)
    xp = device.install(monkeypatch)
    with device.capture():
        there = quantizer.pack(xp.asarray(weight))
        back = quantizer.dense(there, weight.shape, F4)
    assert all(np.array_equal(to_host(there[name]), part) for name, part in here.items())
    assert np.array_equal(to_host(back), quantizer.dense(here, weight.shape, F4))


def test_a_group_longer_than_the_row_is_the_row():
    weight = normal(3, 50)
    long, row = (make_quantizer("affine", {"group": group}).pack(weight) for group in (10**15, 50))
    assert all(np.array_equal(long[name], part) for name, part in row.items())


def test_options_that_cannot_be_are_refused():
    with pytest.raises(RefpeftError, match="group must be at least 1"):
        make_quantizer("affine", {"group": 0})
    with pytest.raises(RefpeftError, match="must not be negative"):
        make_quantizer("affine", {"scale_range": -1.0})


# ---- the peer --------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_given_scale_and_zero_codes_and_values_are_those_of_torch():
    torch = pytest.importorskip("torch")
    weight = normal(64, 96)
    parts, back = round_trip(weight, bits=8, per="row")
    theirs = torch.quantize_per_channel(
        torch.from_numpy(weight),
        torch.from_numpy(parts["scale"][:, 0]),
        torch.from_numpy(parts["zero"][:, 0].astype("i4")),
        axis=0,
        dtype=torch.quint8,
    )
    codes = theirs.int_repr().numpy()
    far = abs(parts["codes"].astype(int) - codes)
    assert far.max() <= 1 and (far > 0).mean() < 1e-3  # torch multiplies by 1 / scale: a tie may fall the other way
    same = far == 0
    assert np.array_equal(back[same], theirs.dequantize().numpy()[same])
