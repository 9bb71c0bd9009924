"""MinRNNForSequenceClassification: padding, batches, both directions, two towers, interfaces."""

import copy
import functools
import itertools
import json
from typing import Any

import pytest
import torch
from helpers import VOCAB, assert_close, assert_same_gradients, gradients, new_model, random_ids
from hypothesis import given
from hypothesis import strategies as st
from test_remote_code import HIDE_PACKAGES, finish, start
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline

from minrnn.data import byte_tokenizer
from minrnn.models import MinRNNConfig, MinRNNForSequenceClassification
from minrnn.models.boundaries import Boundaries
from minrnn.models.modeling_classification import pool

POOLINGS = ["last", "mean"]
KINDS = [(pooling, bidirectional) for pooling in POOLINGS for bidirectional in (False, True)]


def new_classifier(dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 16}
    config = MinRNNConfig(**{**sizes, "pad_token_id": 0, "num_labels": 3, **fields})
    model = MinRNNForSequenceClassification(config).eval()
    torch.nn.Module.to(model, dtype)
    return model


@functools.cache
def shared_classifier(**fields: Any):
    """As `new_classifier`, one for all tests that do not change it."""
    return new_classifier(**fields)


def logits_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def scatter(rows: list[Tensor], masks: Tensor) -> Tensor:
    """The rows' tokens at the places where masks is 1, other tokens elsewhere."""
    ids = random_ids(*masks.shape, seed=99)
    for row, (tokens, mask) in enumerate(zip(rows, masks, strict=True)):
        ids[row, mask.bool()] = tokens
    return ids


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    """Rows of different lengths, and masks that put each at places of its own: left, right or anywhere."""
    time = draw(st.integers(1, 9))
    masks = draw(
        st.lists(
            st.lists(st.integers(0, 1), min_size=time, max_size=time).filter(any), min_size=1, max_size=4
        )
    )
    rows = [random_ids(1, sum(mask), seed=i)[0] for i, mask in enumerate(masks)]
    return rows, torch.tensor(masks)


@pytest.mark.parametrize(("pooling", "bidirectional"), KINDS)
@given(batch=padded_batches())
def test_padding_and_other_rows_change_nothing(pooling, bidirectional, batch):
    model = shared_classifier(pooling=pooling, bidirectional=bidirectional)
    rows, masks = batch
    alone = torch.cat([logits_of(model, tokens[None]) for tokens in rows])
    padded = logits_of(model, scatter(rows, masks), attention_mask=masks)
    assert_close(padded, alone, atol=1e-12)


@pytest.mark.parametrize(("pooling", "bidirectional"), KINDS)
def test_padding_changes_no_gradient(pooling, bidirectional):
    """Of one loss over rows that are scored and a row that is not."""
    model = new_classifier(pooling=pooling, bidirectional=bidirectional)
    rows = [random_ids(1, length, seed=length)[0] for length in (7, 4, 5)]
    masks = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]])
    labels = torch.tensor([2, 0, -100])
    together = model(scatter(rows, masks), attention_mask=masks, labels=labels).loss
    alone = [
        model(row[None], labels=label[None], num_items_in_batch=2).loss
        for row, label in zip(rows[:2], labels[:2], strict=True)
    ]
    assert_close(together, torch.stack(alone).sum(), atol=1e-12)
    assert_same_gradients(gradients(model, together), gradients(model, torch.stack(alone).sum()), 1e-12)


def swap_directions(model: Any) -> None:
    for block in model.model.layers:
        block.mixer, block.reverse.mixer = block.reverse.mixer, block.mixer


@given(batch=padded_batches(), seed=st.integers(0, 3))
def test_the_reversed_row_read_in_the_other_direction_is_the_row(batch, seed):
    """With the mixers exchanged, mean pooling of the reversed rows gives the same logits."""
    rows, masks = batch
    model = copy.deepcopy(shared_classifier(pooling="mean", bidirectional=True, seed=seed))
    expected = logits_of(model, scatter(rows, masks), attention_mask=masks)
    swap_directions(model)
    swapped = logits_of(model, scatter([row.flip(0) for row in rows], masks), attention_mask=masks)
    assert_close(swapped, expected, atol=1e-12)


def test_both_directions_reach_every_output():
    """The first output of a bidirectional model depends on the last token; otherwise it does not."""
    ids = random_ids(1, 8)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1 - 3) % (VOCAB - 3) + 3
    for bidirectional in (False, True):
        body = new_classifier(bidirectional=bidirectional).model
        outputs = [body(tokens).last_hidden_state[0, 0] for tokens in (ids, changed)]
        assert torch.equal(*outputs) != bidirectional


@given(batch=padded_batches(), data=st.data())
def test_documents_of_a_bidirectional_row_are_separate(batch, data):
    """Packed documents give the hidden states of separate documents, in both directions."""
    _, masks = batch
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=masks.numel(), max_size=masks.numel())))
    starts = starts.view(masks.shape)
    body = shared_classifier(bidirectional=True).model
    ids = random_ids(*masks.shape, seed=5)
    with torch.no_grad():
        hidden = body(ids, attention_mask=masks, document_starts=starts).last_hidden_state
    for row, mask in enumerate(masks.bool()):
        tokens, inner = ids[row, mask], starts[row, mask][1:].nonzero()[:, 0] + 1
        cuts = [0, *inner.tolist(), len(tokens)]
        pieces = [tokens[low:high] for low, high in itertools.pairwise(cuts)]
        separate = torch.cat([body(piece[None]).last_hidden_state[0] for piece in pieces])
        assert_close(hidden[row, mask], separate, atol=1e-12)


@given(batch=padded_batches())
def test_the_order_of_the_reverse_pass_is_its_own_inverse(batch):
    _, masks = batch
    lengths, time = masks.sum(1), masks.shape[1]
    order, _ = Boundaries.of(None, lengths, 4).reversed(time, 4)
    assert order is not None
    assert torch.equal(order.gather(1, order), torch.arange(time).expand_as(order))
    for row, length in enumerate(lengths.tolist()):
        assert order[row, :length].tolist() == list(reversed(range(length)))


def test_a_pair_is_read_by_one_encoder():
    """Features u, v, u * v, u - v of both texts, each read alone."""
    model: Any = new_classifier(num_towers=2, pooling="mean")
    texts = [[random_ids(1, 5, seed=1)[0], random_ids(1, 3, seed=2)[0]], [random_ids(1, 2, seed=3)[0]] * 2]
    masks = torch.tensor([[[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]])
    ids = torch.stack([scatter(pair, mask) for pair, mask in zip(texts, masks, strict=True)])
    logits = logits_of(model, ids, attention_mask=masks)
    for row, pair in enumerate(texts):
        u, v = (model.model(text[None]).last_hidden_state[0].mean(0) for text in pair)
        features = torch.cat([u, v, u * v, u - v])
        hidden = torch.nn.functional.silu(model.score.dense.weight @ features)
        assert_close(logits[row], model.score.out_proj.weight @ hidden, atol=1e-12)


def test_a_text_read_in_pieces_has_the_logits_of_the_whole():
    model, ids = new_classifier(), random_ids(3, 11)
    state = output = None
    for piece in ids.split(4, dim=1):
        output = model(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
    assert output is not None
    assert_close(output.logits, logits_of(model, ids), atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({}, {"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "row 1 has no token"),
        ({"num_towers": 2}, {}, r"\[batch, 2, time\], not \(2, 2\)"),
        ({}, {"input_ids": torch.ones(2, 0, dtype=torch.long)}, "The rows have no tokens"),
        ({"bidirectional": True}, {"use_cache": True}, "A bidirectional model reads whole rows"),
        ({"pooling": "mean"}, {"past_key_values": "state"}, "only one tower with pooling 'last'"),
        ({}, {"document_strats": None}, "did you mean"),
    ],
)
def test_wrong_inputs_are_refused(fields, inputs, message):
    model, ids = new_classifier(**fields), random_ids(2, 2)
    if inputs.get("past_key_values") == "state":
        inputs = {"past_key_values": new_classifier().model(ids, use_cache=True).past_key_values}
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{"input_ids": ids, **inputs})


SINGLE, MULTI = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        (
            {},
            torch.ones(2),
            rf"must be float \(2, 3\) for problem_type {MULTI}, but are torch.float32 \(2,\)",
        ),
        ({}, torch.ones(3, dtype=torch.long), r"must be int64 \(2,\) .*, but are torch.int64 \(3,\)"),
        (
            {"problem_type": SINGLE},
            torch.ones(2),
            rf"must be int64 \(2,\) for problem_type {SINGLE}, but are t",
        ),
        (
            {"problem_type": MULTI},
            torch.ones(2, 3, dtype=torch.long),
            r"must be float \(2, 3\) .* torch.int64",
        ),
        (
            {"problem_type": "regression"},
            torch.ones(1),
            r"must be float \(2, 3\) for problem_type regression",
        ),
        ({"num_labels": 1}, torch.ones(2, dtype=torch.long), r"must be float \(2,\) for .* regression"),
    ],
)
def test_wrong_labels_are_refused(fields, labels, message):
    """Also where torch would broadcast them."""
    with pytest.raises(ValueError, match=f"labels {message}"):
        new_classifier(**fields)(random_ids(2, 2), labels=labels)


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="pooling: 'first' is none of last, mean; num_towers: 3"):
        MinRNNConfig(pooling="first", num_towers=3)
    with pytest.raises(ValueError, match="bidirectional is for classifiers"):
        new_model(bidirectional=True)


def test_pooling_ignores_values_at_padding():
    hidden = torch.full((1, 4, 2), torch.nan)
    hidden[0, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_problem_types(problem_type):
    num_labels = 1 if problem_type == "regression" else 3
    model = new_classifier(torch.float32, problem_type=problem_type, num_labels=num_labels)
    labels = torch.rand(4) if num_labels == 1 else torch.randint(2, (4, 3)).float()
    output = model(random_ids(4, 5), labels=labels)
    logits, function = output.logits, torch.nn.functional
    expected = (
        function.mse_loss(logits[:, 0], labels)
        if num_labels == 1
        else function.binary_cross_entropy_with_logits(logits, labels)
    )
    assert_close(output.loss, expected, atol=1e-6)


@pytest.mark.parametrize("fields", [{"bidirectional": True, "pooling": "mean"}, {"num_towers": 2}])
def test_round_trip_is_exact(tmp_path, fields):
    model = new_classifier(torch.float32, **fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, MinRNNForSequenceClassification)
    ids = random_ids(2, 9) if model.config.num_towers == 1 else random_ids(4, 9).view(2, 2, 9)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_a_language_models_weights_begin_a_classifier(tmp_path):
    language_model = new_model()
    language_model.save_pretrained(tmp_path)
    model = MinRNNForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.score.out_features == 5
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor)


def text_classifier(**fields: Any) -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    names = {"vocab_size": 264, "pad_token_id": tokenizer.pad_token_id, "num_labels": 2}
    return new_classifier(torch.float32, **names, id2label={0: "no", 1: "yes"}, **fields), tokenizer


def test_text_classification_pipeline():
    model, tokenizer = text_classifier(pooling="mean", bidirectional=True)
    classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["a good film", "bad", "Grüße"]
    alone, batched = [classify(text)[0] for text in texts], classify(texts, batch_size=3)
    for single, together in zip(alone, batched, strict=True):
        assert single["label"] == together["label"] in ("no", "yes")
        assert single["score"] == pytest.approx(together["score"], abs=1e-6)


REMOTE = """
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
options = {"model": model, "tokenizer": tokenizer, "trust_remote_code": True, "device": "cpu"}
classify = pipeline("text-classification", **options)
print(json.dumps(classify(json.loads(sys.argv[3]), batch_size=2)))
"""


def test_loads_without_the_package(tmp_path):
    model, tokenizer = text_classifier(bidirectional=True, scan_backend="torch")
    folder, texts = tmp_path / "model", ["a good film", "bad"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hidden = ["minrnn", "numba", "llvmlite", "triton"]
    arguments = (str(folder), json.dumps(hidden), json.dumps(texts))
    remote = finish(start(HIDE_PACKAGES + REMOTE, tmp_path / "home", *arguments))
    classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for one, other in zip(remote, classify(texts), strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_trainer_trains(tmp_path):
    model = new_classifier(torch.float32)
    rows: Any = [
        {"input_ids": row, "labels": label, "attention_mask": torch.ones_like(row)}
        for row, label in zip(random_ids(8, 12), torch.arange(8) % 3, strict=True)
    ]
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, learning_rate=1e-2, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 5 for loss in losses), losses
