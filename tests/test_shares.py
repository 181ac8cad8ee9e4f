"""Shares of a batch: contiguous groups of its rows, or of rows that were joined, with where they lie in it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft.batches import IGNORE, Batch, shares
from refpeft.rng import Stream


def padded(lengths: list[int], packed: bool = False, **more) -> Batch:
    """Rows of these lengths, every second token learned; packs of two documents if `packed`."""
    shape = len(lengths), max(lengths)
    real = np.arange(shape[1]) < np.array(lengths)[:, None]
    draw = Stream(len(lengths), "ids")
    ids = np.where(real, draw.uniform(0, 90, shape), 0).astype(np.int32)
    targets = np.where(real & (np.arange(shape[1]) % 2 == 1), (ids * 7) % 90, IGNORE).astype(np.int32)
    cut = np.array(lengths)[:, None] // 2
    second = packed * (np.arange(shape[1]) >= cut)
    segments = np.where(real, second, -1).astype(np.int32)
    positions = np.where(real, np.arange(shape[1]) - second * cut, 0).astype(np.int32) if packed else None
    return Batch(ids, targets, positions, segments, **more)


LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 5), st.booleans(), st.booleans())
def test_shares_are_the_batch_in_its_own_order(lengths, n, packed, joined):
    batch = padded(lengths, packed)
    batch = batch.unpadded() if joined else batch
    found = shares(batch, n)
    assert 1 <= len(found) <= n
    for name in ("ids", "targets", "positions", "segments"):
        parts = [getattr(share, name) for share in found]
        if parts[0] is not None:
            np.testing.assert_array_equal(np.concatenate(parts, axis=int(joined)), getattr(batch, name))
    assert sum(share.denominator for share in found) == batch.denominator
    assert all(share.ids.size for share in found)
    at, asked = 0, 0
    for share in found:
        assert (share.share.here.start, share.share.asked.start) == (at, asked)
        at, asked = share.share.here.stop, share.share.asked.stop
        assert share.share.asked == range(asked - share.supervised, asked)
    assert (at, asked) == (found[0].share.whole, found[0].share.whole_asked)


@given(LENGTHS, st.integers(1, 5))
def test_shares_compute_about_as_much_as_one_another(lengths, n):
    sizes = [share.ids.size for share in shares(padded(lengths).unpadded(), n)]
    assert max(sizes) <= sum(sizes) / n + max(lengths)


def test_rows_that_belong_together_stay_in_one_share():
    batch = padded([4, 3, 5, 2, 6, 6], rows_each=2)
    assert sorted(len(share.ids) for share in shares(batch, 2)) == [2, 4]
    assert [len(share.ids) for share in shares(batch, 6)] == [2, 2, 2]


@given(LENGTHS, st.booleans())
def test_unpadded_has_the_same_tokens_and_documents_in_one_row(lengths, packed):
    batch = padded(lengths, packed)
    one = batch.unpadded()
    real = batch.segments >= 0
    assert one.ids.shape == (1, batch.tokens) == (1, one.tokens)
    np.testing.assert_array_equal(one.ids[0], batch.ids[real])
    np.testing.assert_array_equal(one.targets[0], batch.targets[real])
    documents = [(r, s) for r, s in zip(*np.nonzero(real), strict=True)]
    of_row = [(r, batch.segments[r, t]) for r, t in documents]
    distinct = list(dict.fromkeys(of_row))
    np.testing.assert_array_equal(one.segments[0], [distinct.index(pair) for pair in of_row])
    expected = batch.positions[real] if packed else [t for _, t in documents]
    np.testing.assert_array_equal(one.positions[0], expected)
    np.testing.assert_array_equal(one.starts, np.cumsum([0, *lengths[:-1]]))


def test_what_has_rows_is_not_joined():
    with pytest.raises(ValueError, match="cannot be joined"):
        padded([3, 4], rows_each=2).unpadded()
