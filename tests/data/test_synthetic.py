"""Synthetic tasks: each definition against an independent one, readers, and options."""

import re
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import IGNORE_INDEX, Task, build_task, run_tokenizer
from minrnn.data.synthetic import IN_DISTRIBUTION, SYNTHETIC_TASKS, TaskReader, TaskValidation

SMALL = {
    "selective-copying": {"length": 12, "num_tokens": 3, "test_lengths": [9, 20]},
    "mqar": {"sizes": [[16, 4], [24, 2]], "vocab_size": 20, "test_lengths": [24]},
    "induction-heads": {"length": 10, "test_lengths": [3, 20]},
    "needle": {"length": 120, "test_lengths": [150]},
    "distant-key": {"min_distance": 3, "max_distance": 40, "test_lengths": [50]},
    "distant-register": {"min_distance": 3, "max_distance": 40, "test_lengths": [50]},
}
seeds = st.integers(0, 2**32)
lengths = st.integers(2, 60)
pytestmark = pytest.mark.filterwarnings("error")


def small(name: str, **options):
    task = build_task(f"synthetic/{name}", {**SMALL.get(name, {}), **options})
    assert isinstance(task, Task)
    return task


def drawn(name: str, seed: int, length: int, **options) -> tuple[list[int], list[int]]:
    ids, labels = small(name, **options).example(np.random.default_rng(seed), length)
    assert ids.dtype == labels.dtype == np.int64
    assert len(ids) == len(labels)
    return ids.tolist(), labels.tolist()


def last_answer(labels: list[int]) -> int:
    assert all(label == IGNORE_INDEX for label in labels[:-1])
    return labels[-1]


@given(seeds, lengths)
def test_even_pairs_counts_unequal_neighbours(seed: int, length: int):
    ids, labels = drawn("even-pairs", seed, length)
    assert len(ids) == length
    assert last_answer(labels) == 1 - sum(a != b for a, b in pairwise(ids)) % 2


@given(seeds, lengths)
def test_parity_counts_ones(seed: int, length: int):
    ids, labels = drawn("parity", seed, length)
    assert last_answer(labels) == ids.count(1) % 2
    assert set(ids) <= {0, 1}


@given(seeds, lengths, st.integers(2, 7))
def test_cycle_navigation_walks(seed: int, length: int, ring_size: int):
    ids, labels = drawn("cycle-navigation", seed, length, ring_size=ring_size)
    names, position = small("cycle-navigation", ring_size=ring_size).symbols, 0
    for token in ids:
        position += int(names[token])
        position = {-1: ring_size - 1, ring_size: 0}.get(position, position)
    assert names[last_answer(labels)] == f"position-{position}"


@given(seeds, lengths)
def test_missing_duplicate_fills_the_hole(seed: int, length: int):
    ids, labels = drawn("missing-duplicate", seed, length)
    assert len(ids) == length // 2 * 2
    filled = [last_answer(labels) if token == 2 else token for token in ids]
    assert ids.count(2) == 1
    assert filled[: len(ids) // 2] == filled[len(ids) // 2 :]
    assert set(filled) <= {0, 1}


@given(seeds, lengths)
def test_missing_duplicate_9_goes_on_with_the_copy(seed: int, length: int):
    ids, labels = drawn("missing-duplicate-9", seed, length)
    whole = [*ids, last_answer(labels)]
    assert len(whole) == length + length % 2
    assert whole[: len(whole) // 2] == whole[len(whole) // 2 :]
    assert set(whole) <= set(range(9))


@given(seeds, lengths, st.sampled_from([5, 10]))
def test_bucket_sort_sorts(seed: int, length: int, num_symbols: int):
    ids, labels = drawn(f"bucket-sort-{num_symbols}", seed, length)
    half = length // 2
    assert ids[half:] == [num_symbols] * half
    assert labels[:half] == [IGNORE_INDEX] * half
    counts = Counter(ids[:half])
    assert labels[half:] == [symbol for symbol in range(num_symbols) for _ in range(counts[symbol])]


@given(seeds, lengths)
def test_majority_and_its_count(seed: int, length: int):
    ids, labels = drawn("majority", seed, length)
    best = max(range(63), key=lambda symbol: (ids.count(symbol), symbol))
    assert last_answer(labels) == best
    ids, labels = drawn("majority-count", seed, length)
    assert last_answer(labels) == max(ids.count(symbol) for symbol in range(63))
    assert max(ids) < 63


@given(seeds, st.integers(1, 5), st.integers(0, 30), st.integers(4, 9))
def test_selective_copying_repeats_the_tokens_in_order(
    seed: int, num_tokens: int, blanks: int, vocab_size: int
):
    length = num_tokens + blanks
    ids, labels = drawn(
        "selective-copying",
        seed,
        length + num_tokens,
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        test_lengths=[],
    )
    tokens = [token for token in ids[:length] if token != 0]
    assert len(tokens) == num_tokens
    assert set(tokens) <= set(range(1, vocab_size - 1))
    assert ids[length:] == [vocab_size - 1] * num_tokens
    assert labels == [IGNORE_INDEX] * length + tokens


@given(seeds, st.sampled_from([(16, 4), (24, 2)]))
def test_mqar_asks_each_key_once(seed: int, size: tuple[int, int]):
    length, num_pairs = size
    ids, labels = drawn("mqar", seed, length)
    pairs = dict(zip(ids[0 : 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2], strict=True))
    assert len(ids) == length
    assert len(pairs) == len(set(pairs.values())) == num_pairs
    assert all(0 < key < 10 <= value < 20 for key, value in pairs.items())
    scored = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    assert {ids[i]: labels[i] for i in scored} == pairs
    assert len(scored) == num_pairs
    assert min(scored) >= 2 * num_pairs


@given(seeds, st.integers(3, 60))
def test_induction_heads_say_what_followed_the_marker(seed: int, length: int):
    ids, labels = drawn("induction-heads", seed, length)
    assert ids.count(15) == 2
    assert ids[-1] == 15
    assert last_answer(labels) == ids[ids.index(15) + 1]


@given(seeds, st.integers(0, 300), st.integers(1, 9))
def test_needle_asks_for_the_key_in_the_text(seed: int, extra: int, num_digits: int):
    length = small("needle", num_digits=num_digits).min_valid_length + extra
    ids, labels = drawn("needle", seed, length, num_digits=num_digits)
    text = bytes([*ids, labels[-1]]).decode()
    (digits,) = re.findall(r"The pass key is (\d+)\. Remember it\.", text)
    assert len(digits) == num_digits
    assert text.endswith(f"What is the pass key? The pass key is {digits}")
    assert len(ids) == length
    assert [label for label in labels if label != IGNORE_INDEX] == list(digits.encode())
    assert labels[-num_digits:] == list(digits.encode())


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_tokens_lie_in_the_vocabulary_and_lengths_in_their_range(name: str):
    task = small(name)
    tokenizer = run_tokenizer(f"synthetic/{name}", "unused", SMALL.get(name))
    assert tokenizer.pad_token_id == task.pad
    assert max(tokenizer.get_vocab().values()) < len(task.symbols) + 4
    generator, seen, answers = np.random.default_rng(0), set(), set()
    for _ in range(300):
        ids, labels = task.example(generator, task.draw_length(generator))
        scored = labels[labels != IGNORE_INDEX]
        assert min(ids.min(), scored.min()) >= 0
        assert max(ids.max(), scored.max()) < len(task.symbols)
        seen.add(len(ids))
        answers |= set(scored.tolist())
    assert max(seen) <= task.max_train_length
    assert len(answers) <= task.num_answers
    assert task.scaled_accuracy(task.chance) == 0.0
    assert task.scaled_accuracy(1.0) == 1.0


def test_a_vocabulary_is_a_tokenizer():
    tokenizer = run_tokenizer("synthetic/cycle-navigation", "unused")
    assert tokenizer("+1 -1 position-4 0").input_ids == [1, 2, 7, 0]
    assert tokenizer("elsewhere").input_ids == [tokenizer.unk_token_id]
    assert run_tokenizer("synthetic/needle", "unused")("ab").input_ids[-2:] == [97, 98]


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_a_reader_resumes_from_its_state(name: str):
    task = small(name)
    whole = TaskReader(task, 1, 3, task.max_train_length + 2, seed=7)
    chunks = [whole.next_chunk() for _ in range(5)]
    resumed = TaskReader(task, 1, 3, task.max_train_length + 2, seed=7, state=chunks[2].state)
    for expected in chunks[3:]:
        chunk = resumed.next_chunk()
        assert chunk.state == expected.state
        np.testing.assert_array_equal(chunk.input_ids, expected.input_ids)
        np.testing.assert_array_equal(chunk.shift_labels, expected.shift_labels)
    others = [TaskReader(task, reader, 3, task.max_train_length, seed) for reader, seed in ((0, 7), (1, 8))]
    first = chunks[0].input_ids[:, : task.max_train_length]
    assert all((other.next_chunk().input_ids != first).any() for other in others)


def test_a_chunk_holds_one_sequence_to_a_lane():
    chunk = TaskReader(small("parity"), 0, 8, 50, seed=0).next_chunk()
    for ids, labels, starts in zip(chunk.input_ids, chunk.shift_labels, chunk.document_starts, strict=True):
        (scored,) = np.flatnonzero(labels != IGNORE_INDEX)
        assert (ids[: scored + 1] < 2).all()
        assert (ids[scored + 1 :] == 4).all()  # 0, 1, <bos>, <eos>, <pad>
        assert starts.tolist() == [True] + [False] * 49


def rows(name: str, num_readers: int, lanes: int) -> list[tuple[int, tuple[int, ...]]]:
    """(length, tokens and labels) of every validation example, in order."""
    task = small(name, validation_examples=11)
    examples = []
    for reader in range(num_readers):
        for length, chunk in TaskValidation(task, reader, num_readers, lanes, multiple=4).chunks():
            assert chunk.input_ids.shape[1] % 4 == 0
            scored = chunk.shift_labels != IGNORE_INDEX
            for ids, labels in zip(
                chunk.input_ids[scored.any(1)], chunk.shift_labels[scored.any(1)], strict=True
            ):
                examples.append((length, (*ids.tolist(), *labels.tolist())))
    return sorted(examples)


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_the_validation_set_does_not_depend_on_the_number_of_readers(name: str):
    task = small(name)
    whole = rows(name, 1, 4)
    assert Counter(length for length, _ in whole) == dict.fromkeys((IN_DISTRIBUTION, *task.test_lengths), 11)
    for num_readers, lanes in ((2, 3), (3, 16)):
        assert rows(name, num_readers, lanes) == whole


def test_readers_have_equally_many_validation_chunks():
    """No chunk is larger than training's, unless a single sequence is."""
    task = small("parity", validation_examples=9)
    shapes = [
        [chunk.input_ids.shape for _, chunk in TaskValidation(task, reader, 4, lanes=2).chunks()]
        for reader in range(4)
    ]
    assert all([time for _, time in shape] == [time for _, time in shapes[0]] for shape in shapes)
    assert {rows for shape in shapes for rows, time in shape if rows * time > 2 * task.max_train_length} <= {
        1
    }


def test_training_and_validation_share_no_seed(monkeypatch):
    seeds: dict[str, set] = {"train": set(), "validation": set()}
    original, split = np.random.default_rng, "train"

    def default_rng(seed):
        seeds[split].add(tuple(np.random.SeedSequence(seed).generate_state(4)))
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    for reader in range(3):
        for seed in (0, 1, 2**40):
            task_reader = TaskReader(small("parity"), reader, 1, 40, seed)
            for _ in range(50):
                task_reader.next_chunk()
    split = "validation"
    for _ in islice(TaskValidation(small("parity", validation_examples=50), 0, 1, 1).chunks(), 400):
        pass
    assert len(seeds["train"]) == 3 * 3 * 50
    assert len(seeds["validation"]) == 400
    assert not seeds["train"] & seeds["validation"]


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (
            "parities",
            {},
            "there is no task synthetic/parities (did you mean synthetic/parity",
        ),
        ("", {}, "error: data.corpus: there is no task synthetic/ (did you mean synthetic/"),
        ("parity", {"max_lenght": 3}, "unknown option max_lenght (did you mean max_length"),
        ("parity", {"max_length": "long"}, "max_length: input should be a valid integer"),
        ("parity", {"min_length": 0}, "min_length: must be at least 1, not 0"),
        ("parity", {"min_length": 9, "max_length": 8}, "max_length: must be at least 9"),
        (
            "bucket-sort-5",
            {"test_lengths": [1]},
            "test_lengths: the shortest sequence has 2 positions, so there is none of 1",
        ),
        (
            "selective-copying",
            {"length": 3, "num_tokens": 4},
            "length: 3 positions cannot hold 4 tokens (num_tokens)",
        ),
        ("selective-copying", {"vocab_size": 3}, "vocab_size: must be at least 4"),
        (
            "mqar",
            {"sizes": [[64, 17]]},
            "sizes: 17 pairs and as many queries need at least 1 pair and 68 positions, not 64",
        ),
        ("mqar", {"vocab_size": 8}, "vocab_size: 8 has 3 keys, too few for 64 pairs"),
        ("mqar", {"sizes": [[64, 2], [64, 4]], "test_lengths": []}, "sizes: must name each length once"),
        (
            "mqar",
            {"test_lengths": [65]},
            "test_lengths: 65 is none of the lengths in sizes (64, 128, 256, 512)",
        ),
        ("mqar", {"power": float("nan")}, "power: input should be a finite number"),
        ("induction-heads", {"length": 2}, "length: 2 is too short: a sequence has at least 3 positions"),
        ("needle", {"length": 50}, "length: 50 is too short: a sequence has at least "),
        (
            "needle",
            {"validation_examples": 0, "num_digits": 0},
            "validation_examples: must be at least 1, not 0; num_digits: must be",
        ),
    ],
)
def test_invalid_options_are_reported(corpus: str, options: dict, message: str):
    with pytest.raises(UserError) as raised:
        build_task(f"synthetic/{corpus}", options)
    assert message in str(raised.value)
