from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refpeft import RefpeftError
from refpeft.batches import IGNORE, Batches, pack_rows, split
from refpeft.examples import Example

LENGTH = 24


def made(masks):
    """Examples with the given masks; every token of the set has its own number, so that it can be followed."""
    examples, at = [], 0
    for line, mask in enumerate(masks, start=1):
        examples.append(Example(np.arange(at, at + len(mask), dtype=np.int32), np.array(mask), line))
        at += len(mask)
    return examples


example_sets = st.lists(st.lists(st.booleans(), min_size=1, max_size=LENGTH), min_size=1, max_size=12).map(made)


def documents(batch):
    """(row, segment) -> positions in time of each document of a batch."""
    segments = np.zeros_like(batch.ids) if batch.segments is None else batch.segments
    for row, line in enumerate(segments):
        for segment in set(line.tolist()) - {-1}:
            yield row, np.flatnonzero(line == segment)


@given(example_sets, st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_has_every_token_and_every_target_once(examples, size, pack, shuffle, epoch):
    batches = Batches(examples, size, LENGTH, pack=pack, seed=1, shuffle=shuffle)
    ids, targets = Counter(), Counter()
    for step in range(batches.steps_per_epoch):
        batch = batches.at(epoch * batches.steps_per_epoch + step)
        assert batch.ids.dtype == batch.targets.dtype == np.int32 and batch.ids.shape == batch.targets.shape
        assert batch.ids.shape[1] <= batches.longest <= LENGTH
        real = np.ones(batch.ids.shape, bool) if batch.segments is None else batch.segments >= 0
        ids.update(batch.ids[real].tolist())
        targets.update(batch.targets[batch.targets >= 0].tolist())
        assert (batch.targets[~real] == IGNORE).all()
        assert batch.tokens == real.sum() and batch.supervised == (batch.targets >= 0).sum()
    assert ids == Counter(i for example in examples for i in example.ids.tolist())
    assert targets == Counter(i for example in examples for i in example.ids[1:][example.supervised[1:]].tolist())


@given(example_sets, st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_a_target_is_the_next_token_of_the_same_document(examples, size, pack):
    ends = {int(example.ids[-1]) for example in examples}
    starts = {int(example.ids[0]) for example in examples}
    for batch in Batches(examples, size, LENGTH, pack=pack):
        counted = batch.targets >= 0
        assert (batch.targets[counted] == batch.ids[counted] + 1).all()  # tokens of a document are numbered in order
        assert not set(batch.ids[counted].tolist()) & ends and not set(batch.targets[counted].tolist()) & starts


@given(example_sets)
@settings(deadline=None)
def test_documents_in_a_packed_row_lie_apart_and_count_from_zero(examples):
    for batch in Batches(examples, 2, LENGTH, pack=True):
        for row, where in documents(batch):
            assert (np.diff(where) == 1).all()
            assert batch.positions[row, where].tolist() == list(range(len(where)))
            assert batch.ids[row, where[0]] in {e.ids[0] for e in examples if len(e) == len(where)}
        padding = batch.segments < 0
        assert (padding[:, 1:] >= padding[:, :-1]).all()  # on the right


@given(example_sets, st.integers(0, 5))
@settings(deadline=None)
def test_packing_fits_loses_nothing_and_wastes_less_than_half(examples, seed):
    rows = pack_rows(examples, LENGTH, seed)
    assert sorted(e.line for row in rows for e in row) == [e.line for e in examples]
    sizes = sorted(sum(map(len, row)) for row in rows)
    assert sizes[-1] <= LENGTH
    assert len(sizes) < 2 or sizes[0] + sizes[1] > LENGTH  # no two rows would fit into one


def test_packing_is_fast_enough_for_a_hundred_thousand_rows():
    lengths = np.random.default_rng(0).integers(1, LENGTH, 100_000)
    token = np.zeros(LENGTH, np.int32)
    examples = [Example(token[:n], token[:n] == 0, 1) for n in lengths.tolist()]
    rows = pack_rows(examples, LENGTH)
    assert len(rows) * LENGTH < 1.01 * lengths.sum()


def test_a_row_of_one_document_without_padding_needs_no_segments():
    batch = Example.collate([made([[True] * 3])[0:1], made([[True] * 3])[0:1]])
    assert batch.segments is None and batch.positions is None and batch.tokens == 6
    batch = Example.collate([made([[True] * 3]), made([[False, True]])])
    assert batch.segments.tolist() == [[0, 0, 0], [0, 0, -1]] and batch.positions is None
    assert batch.targets.tolist() == [[1, 2, -100], [1, -100, -100]]
    packed = Example.collate([made([[True] * 2, [False, True]])], packed=True)
    assert packed.segments.tolist() == [[0, 0, 1, 1]] and packed.positions.tolist() == [[0, 1, 0, 1]]
    assert packed.targets.tolist() == [[1, -100, 3, -100]]


def test_a_step_has_the_same_rows_whenever_it_is_asked_for():
    examples = made([[True] * (1 + i % 7) for i in range(20)])
    forward, backward = Batches(examples, 3, LENGTH, seed=5), Batches(examples, 3, LENGTH, seed=5)
    assert forward.steps_per_epoch == len(forward) == 7
    steps = list(range(3 * forward.steps_per_epoch))
    first = {step: forward.at(step) for step in steps}
    second = {step: backward.at(step) for step in reversed(steps)}
    assert all(np.array_equal(first[step].ids, second[step].ids) for step in steps)
    assert len(first[6].ids) == 2  # the last of an epoch is kept, with what is left


def test_epochs_and_seeds_differ_in_order_and_evaluation_does_not_shuffle():
    examples = made([[True] * 2] * 50)

    def order(seed, epoch, shuffle=True):
        return Batches(examples, 50, LENGTH, seed=seed, shuffle=shuffle).at(epoch).ids[:, 0].tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 0, shuffle=False) == order(1, 5, shuffle=False) == sorted(order(0, 0))


def test_evaluation_begins_with_the_longest_row():
    batches = Batches(made([[True] * 2, [True] * 9, [True] * 5]), 1, LENGTH, shuffle=False)
    assert [batch.ids.shape[1] for batch in batches] == [9, 5, 2] and batches.longest == 9


def lengths_of(batches: Batches, epoch: int = 0) -> list[list[int]]:
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    return [[sum(map(len, row)) for row in batches._rows_at(step)] for step in steps]


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 2))
@settings(deadline=None)
def test_by_length_every_epoch_has_every_row_once_and_its_longest_full_batch_first(lengths, size, epoch):
    batches = Batches(made([[True] * n for n in lengths]), size, LENGTH, by_length=True)
    found = lengths_of(batches, epoch)
    assert sorted(n for batch in found for n in batch) == sorted(lengths)
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    full = [max(batch) for batch in found if len(batch) == size]
    assert not full or full[0] == max(full)


def test_by_length_little_is_padding_and_epochs_differ():
    examples = made([[True] * (1 + 7 * i % LENGTH) for i in range(200)])

    def padding(by_length):
        found = lengths_of(Batches(examples, 8, LENGTH, by_length=by_length))
        return sum(max(batch) * len(batch) - sum(batch) for batch in found)

    assert padding(True) < padding(False) / 3
    grouped = Batches(examples, 8, LENGTH, by_length=True)
    assert lengths_of(grouped, 0) != lengths_of(grouped, 1)
    assert lengths_of(grouped, 1) == lengths_of(Batches(examples, 8, LENGTH, by_length=True), 1)


@given(example_sets, st.integers(1, 6), st.integers(1, 6), st.booleans())
@settings(deadline=None)
def test_splitting_a_batch_keeps_every_row_and_cuts_padding_only(examples, size, rows, pack):
    for batch in Batches(examples, size, LENGTH, pack=pack):
        parts = split(batch, rows)
        assert sum(part.tokens for part in parts) == batch.tokens
        assert sum(part.supervised for part in parts) == batch.supervised
        assert all(len(part.ids) <= rows for part in parts)
        at = 0
        for part in parts:
            here, time = slice(at, at + len(part.ids)), part.ids.shape[1]
            assert np.array_equal(part.ids, batch.ids[here, :time])
            assert np.array_equal(part.targets, batch.targets[here, :time])
            assert (part.positions is None) == (batch.positions is None)
            if part.segments is None:
                assert batch.segments is None or (batch.segments[here, :time] == 0).all()
            else:
                assert (part.segments >= 0).any(axis=0).all()  # no column is padding only
            at += len(part.ids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 1, 8), "no examples"),
        ((made([[True] * 9]), 1, 8), "an example has 9 tokens, but a row 8"),
        ((made([[True] * 9]), 0, 9), "batch is 0"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(RefpeftError, match=message):
        Batches(*arguments)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=17))
def test_rows_by_turns_are_the_same_rows_the_longest_beside_the_shortest(lengths):
    rows = [[Example(np.full(n, at, "i4"), np.ones(n, bool), at)] for at, n in enumerate(lengths)]
    batch = Example.collate(rows)
    turned = batch.by_turns()
    order = turned.ids[:, 0]
    assert sorted(order) == list(range(len(rows)))
    assert np.array_equal(turned.ids, batch.ids[order]) and np.array_equal(turned.targets, batch.targets[order])
    if len(set(lengths)) > 1:
        assert [lengths[row] for row in order[:2]] == [max(lengths), min(lengths)]
