"""Batches of labelled examples: each is read once in an epoch, and scored once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minrnn.data import IGNORE_INDEX
from minrnn.data.lra import LabelledReader, LabelledSet
from minrnn.data.lra.examples import Examples


@given(
    count=st.integers(5, 40), num_readers=st.integers(1, 4), lanes=st.integers(1, 5), seed=st.integers(0, 3)
)
def test_readers_read_each_example_once_in_an_epoch(count: int, num_readers: int, lanes: int, seed: int):
    """Whatever the number of lanes, in an order of (seed, epoch); a reader goes on from any of its states."""
    examples = numbered(count)
    orders = []
    for reader in range(num_readers):
        share = -(-(count - reader) // num_readers)
        stream = LabelledReader(examples, reader, num_readers, lanes, 0, seed)
        batches = [stream.next_chunk() for _ in range(-(-2 * share // lanes) + 1)]
        middle = LabelledReader(examples, reader, num_readers, lanes, 0, seed, batches[0].state)
        for batch in batches[1:]:
            assert np.array_equal(middle.next_chunk().labels, batch.labels)
        labels = np.concatenate([batch.labels for batch in batches]).tolist()
        orders.append((labels[:share], labels[share : 2 * share]))
        assert all(
            batch.input_ids[row, 0] == label for batch in batches for row, label in enumerate(batch.labels)
        )
    for epoch in range(2):
        assert sorted(label for order in orders for label in order[epoch]) == list(range(count))


@given(count=st.integers(1, 30), num_readers=st.integers(1, 4), lanes=st.integers(1, 5))
def test_a_set_scores_each_example_once(count: int, num_readers: int, lanes: int):
    shares = [LabelledSet(numbered(count), 2, reader, num_readers, lanes, 0) for reader in range(num_readers)]
    batches = [list(share.chunks()) for share in shares]
    assert len({len(own) for own in batches}) == 1
    labels = [label for own in batches for batch in own for label in batch.labels.tolist()]
    assert sorted(label for label in labels if label != IGNORE_INDEX) == list(range(count))
    assert sum(share.num_positions for share in shares) == len(numbered(count).tokens)


def numbered(count: int) -> Examples:
    """Examples whose label and tokens are their number; example n has n % 7 + 1 tokens."""
    lengths = [number % 7 + 1 for number in range(count)]
    tokens = np.concatenate([np.full(length, number, np.uint8) for number, length in enumerate(lengths)])
    return Examples(tokens, np.cumsum([0, *lengths]), np.arange(count), 1, np.arange(count))
