"""Blocks and rotations, and what methods made of them refuse."""

import numpy as np
import pytest
import tiny

from refpeft import sites, structured
from refpeft.errors import RefpeftError
from refpeft.tensor import Tensor


def drawn(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("n", [2, 3, 6])
def test_skew_matrices_have_the_numbers_above_the_diagonal_row_by_row(n):
    above = drawn(4, n * (n - 1) // 2)
    S = structured.skew(above, n).data
    assert np.array_equal(S, -S.transpose(0, 2, 1))
    assert np.array_equal(S[:, *np.triu_indices(n, 1)], above.data)


def test_cayley_gives_rotations_that_turn_towards_s():
    S = structured.skew(drawn(5, 6), 4)
    R = structured.cayley(S).data
    assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(4), atol=1e-13)
    assert np.linalg.det(R) == pytest.approx(1)
    small = structured.cayley(Tensor(1e-4 * S.data)).data
    assert np.allclose(small, np.eye(4) + 2e-4 * S.data, atol=1e-6)


@pytest.mark.parametrize("count", [3, 1])
def test_times_blocks_is_the_product_with_the_block_diagonal_matrix(count):
    x, blocks = drawn(2, 5, 6), drawn(count, 2, 2)
    whole = np.zeros((6, 6))
    for i in range(3):
        whole[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = blocks.data[i % count]
    assert np.allclose(structured.times_blocks(x, blocks).data, x.data @ whole, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "oft",
            {},
            "block_size is 32, which does not divide the 24 inputs of model.layers.0.self_attn.q_proj; 24 fits",
        ),
        ("oft", {"block_size": 1}, "block_size of at least 2"),
        ("oft", {"terms": 3}, "terms of at least 4"),
        ("boft", {"butterfly_factors": 3}, "which does not divide the 24 inputs"),
        ("boft", {"block_size": 3}, "even for several factors"),
        ("hra", {"r": 5}, "r is 5: expected an even number"),
        ("hra", {"r": 26}, "r is 26, more than the 24 inputs of model.layers.0.self_attn.q_proj"),
        ("road", {}, "road: group_size is 64, which does not divide the 24 outputs .*; 12 fits all targets"),
        ("road", {"group_size": 3}, "group_size is 3: expected an even number"),
        ("c3a", {"block_size": 5}, "block_size is 5, which does not divide the 24 outputs .*; 4 fits"),
        ("fourierft", {"frequencies": 300}, "frequencies is 300, but model.layers.0.self_attn.v_proj has 288 numbers"),
        ("miss", {}, "r is 64, more than the 24 inputs"),
        ("miss", {"r": 4, "mini_r": 5}, "mini_r is 5, which does not divide the 24 outputs"),
        ("vblora", {"vector_length": 9}, "vector_length is 9, which does not divide the 24 inputs"),
        ("vblora", {"topk": 300}, "topk is 300, more than the 256 vectors"),
        ("intrinsic_said", {"d": 21}, "d is 21: expected 22 to .* for these targets"),
        ("intrinsic_said", {"said": False, "targets": ["@norm"]}, "d is 10000: expected 1 to 120 for these targets"),
        ("randlora", {"r": 13}, r"r is 13, more than a side of model.layers.0.self_attn.v_proj, which is \(12, 24\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_one_that_can(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), method, options)


@pytest.mark.parametrize("method", ["oft", "boft", "hra"])
def test_rotations_keep_the_angles_between_rows_of_the_weight(method):
    model = tiny.model()
    site = model.sites["model.layers.0.self_attn.q_proj"]
    before = site.weight()
    adapter = sites.attach(model, method, {"targets": [site.name]} | ({"block_size": 8} if method == "oft" else {}))
    tiny.scramble(adapter)
    sites.merge(model)
    cosines = [rows @ rows.T for rows in (w / np.sqrt((w * w).sum(1, keepdims=True)) for w in (before, site.weight()))]
    assert abs(site.weight() - before).max() > 0.01
    assert np.allclose(*map(abs, cosines), atol=1e-12)


def test_the_series_is_near_the_exact_rotation_where_s_is_small():
    outputs = []
    for cayley in ("exact", "neumann"):
        model = tiny.model()
        terms = {"terms": 9} if cayley == "neumann" else {}
        tiny.scramble(sites.attach(model, "oft", {"block_size": 4, "cayley": cayley, **terms}), scale=0.03)
        outputs.append(model(tiny.ids()).data)
    assert 0 < abs(outputs[0] - outputs[1]).max() < 1e-6


def test_a_butterfly_factor_connects_halves_that_lie_apart():
    """With three factors of blocks of two every input of eight reaches every other; with two, four do."""
    for factors, reach in ((1, 2), (2, 4), (3, 8)):
        model = tiny.model("wide")
        site = model.sites["model.layers.0.self_attn.q_proj"]
        options = {"block_size": 2, "butterfly_factors": factors, "targets": [site.name]}
        tiny.scramble(sites.attach(model, "boft", options), scale=1.0)
        site.weight = type(site.weight)(np.eye(32), np.dtype("f8"))
        sites.merge(model)
        assert np.array_equal(site.weight() != 0, np.kron(np.eye(32 // reach), np.ones((reach, reach))) > 0)
