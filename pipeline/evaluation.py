"""Validation, on held-out documents read whole with the state carried as in training, or on the fixed
examples of a task."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..common.errors import UserError
from ..data import (
    IGNORE_INDEX,
    AnyCorpus,
    Chunk,
    CorpusSpec,
    Encoder,
    HeldOut,
    LabelledSet,
    MixtureSpec,
    TaskValidation,
    ValidationSet,
    concatenated,
    corpus_tokens,
    has_fewer_texts,
    has_splits,
    held_out_documents,
    held_out_text,
    source_specs,
)
from ..data.corpus import Split
from ..data.synthetic import IN_DISTRIBUTION
from ..data.synthetic.distance import NUM_DISTANCES, sums_by_distance
from ..models import MinRNNCache
from ..models.dtypes import at_least_fp32
from .classification import open_labelled, score_labels
from .config import Recipe
from .processes import ProcessLayout, all_reduce_max, all_reduce_sum, to_device
from .source_settings import source_names

ValidationSets = Sequence[ValidationSet] | Sequence[TaskValidation] | Sequence[LabelledSet]
PIECE = 8  # each process of a context group has a multiple of this many positions of a task's chunk


def validation_spec(recipe: Recipe, corpus: AnyCorpus) -> tuple[AnyCorpus, Split]:
    """The corpus that holds the text for validation, and the part of it.

    Raises:
        UserError: files of text cannot be read.
    """
    data, batch = recipe.data, recipe.batch
    if data.validation is None:
        return corpus, "validation"
    split = data.validation_split
    is_left_out = split == type(data).model_fields["validation_split"].default
    if is_left_out and not has_splits(data.validation):
        split = CorpusSpec.split
    spec = dataclasses.replace(
        source_specs(corpus)[0],
        corpus=data.validation,
        subset=data.validation_subset,
        split=split,
        revision=data.validation_commit or data.validation_revision,
        text_field=data.text_field,
        join=data.join,
        hold_out=data.hold_out,
        rules=data.rules(),
        held_out=0.0,
        passages=False,
    )
    if data.order == "continuous" and has_fewer_texts(spec, batch.readers * batch.lanes):
        spec = dataclasses.replace(spec, passages=True)
    return spec, "all"


@contextmanager
def validation_errors(recipe: Recipe) -> Iterator[None]:
    """Report the errors of a corpus under the key that names it."""
    try:
        yield
    except UserError as error:
        if recipe.data.validation is None:
            raise
        keys = {
            "data.subset": "data.validation_subset",
            "data.split": "data.validation_split",
            "data.revision": "data.validation_revision",
            "data.filter": "data.filter",  # this and data.order are of both corpora
            "data.order": "data.order",
        }
        errors = ((keys.get(key, "data.validation"), message) for key, message in error.errors)
        raise UserError.from_list(errors) from None


def validation_budgets(spec: MixtureSpec, max_tokens: int | None) -> list[int | None]:
    """The share of data.validation_tokens that each source of a mixture has, by its weight."""
    return [max_tokens and max(round(max_tokens * weight), 1) for weight in spec.weights]


def make_held_out(
    recipe: Recipe, corpus: AnyCorpus, encoder: Encoder, after_document: Callable[[], None] = lambda: None
) -> HeldOut:
    """Read the text for validation, in one pass.

    Raises:
        UserError: the corpus does not exist or is empty; under data.validation if that names it.
    """
    max_tokens = recipe.data.validation_tokens
    with validation_errors(recipe):
        spec, part = validation_spec(recipe, corpus)
        if isinstance(spec, MixtureSpec):
            budgets = validation_budgets(spec, max_tokens)
            pairs = zip(spec.sources, budgets, strict=True)
            return concatenated(
                [held_out_documents(source, part, encoder, most, after_document) for source, most in pairs]
            )
        if recipe.data.order == "windows":
            return held_out_text(corpus_tokens(spec, part, encoder), encoder, max_tokens)
        return held_out_documents(spec, part, encoder, max_tokens, after_document)


def validation_sets(recipe: Recipe, held_out: HeldOut | None, readers: range) -> ValidationSets:
    """The validation sets of these readers.

    Args:
        held_out: as `make_held_out` returns it; None for a task.
    """
    data, batch = recipe.data, recipe.batch
    if (labelled := open_labelled(recipe)) is not None:
        return labelled.sets("validation", readers, batch.readers, batch.lanes)
    if (task := recipe.synthetic_task()) is not None:
        return [
            TaskValidation(
                task,
                reader,
                batch.readers,
                batch.lanes,
                PIECE * recipe.parallel.context,
                batch.chunk if task.is_stream else None,
            )
            for reader in readers
        ]
    assert held_out is not None
    if isinstance(data.corpus, list) and data.validation is None:
        layout = (batch.readers, batch.lanes, batch.chunk)
        parts = [(name, held_out.of_source(i)) for i, name in enumerate(source_names(data.corpus))]
        return [
            dataclasses.replace(part.documents(reader, *layout), source=name)
            for name, part in parts
            for reader in readers
        ]
    share = held_out.crops if data.order == "windows" else held_out.documents
    return [share(reader, batch.readers, batch.lanes, batch.chunk) for reader in readers]


@torch.no_grad()
def validate(
    model: nn.Module,
    sets: ValidationSets,
    accelerator: Accelerator,
    carry_state: bool,
    layout: ProcessLayout | None = None,
    in_lockstep: bool = False,
    after_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean loss in nats per token, bits per byte, and the number of tokens, over the sets of all processes.

    For a mixture, also the bits per byte of each source: `by_source`. For a synthetic task: loss and accuracy
    at the lengths of training, and accuracy by length; if its answers have distances, also accuracy by
    distance, where "1024" stands for 1,024 to 2,047. For labelled examples: loss and accuracy
    (`score_labels`).

    Args:
        layout: this process's part of each sequence; by default all of it.
        in_lockstep: a forward pass needs all processes. Those that have read all their documents then repeat
            empty passes until all have.
        after_chunk: called after each chunk.
    """
    layout = layout or ProcessLayout()
    if labelled := [part for part in sets if isinstance(part, LabelledSet)]:
        return score_labels(model, labelled, accelerator, after_chunk)
    if examples := [part for part in sets if isinstance(part, TaskValidation)]:
        return _validate_task(model, examples, accelerator, carry_state, layout, after_chunk)
    texts = [part for part in sets if isinstance(part, ValidationSet)]
    model.eval()
    sources = list(dict.fromkeys(part.source for part in texts))  # every process has a set of each
    sums = np.zeros((len(sources), 3))  # nats, tokens, bytes
    for part in texts:
        nats, tokens = _read_texts(model, part, accelerator, carry_state, layout, after_chunk)
        sums[sources.index(part.source)] += nats, tokens, part.num_bytes / layout.context
    if in_lockstep:
        num_chunks = sum(1 for part in texts for _ in part.chunks())
        empty = torch.zeros(1, 64, dtype=torch.long, device=accelerator.device)
        for _ in range(all_reduce_max(accelerator, num_chunks) - num_chunks):
            model(input_ids=empty, shift_labels=empty, skip_logits=True, num_items_in_batch=1)
            after_chunk()
    model.train()
    sums = np.reshape(all_reduce_sum(accelerator, sums.ravel().tolist()), sums.shape)
    nats, tokens, num_bytes = sums.sum(0).tolist()
    result = {
        "loss": nats / tokens,
        "bits_per_byte": nats / (num_bytes * math.log(2)),
        "validation_tokens": int(tokens),
    }
    if len(sources) > 1:
        bits = sums[:, 0] / (sums[:, 2] * math.log(2))
        result["by_source"] = dict(zip(sources, bits.tolist(), strict=True))
    return result


def _read_texts(
    model: nn.Module,
    part: ValidationSet,
    accelerator: Accelerator,
    carry_state: bool,
    layout: ProcessLayout,
    after_chunk: Callable[[], None],
) -> tuple[float, int]:
    """Read all documents of a set; returns their loss in nats and the number of scored tokens."""
    cache, nats, tokens = None, 0.0, 0
    for chunk in part.chunks():
        if cache is not None:
            cache.batch_select_indices(slice(0, chunk.input_ids.shape[0]))
        piece = layout.piece(chunk)
        output = model(
            input_ids=to_device(piece.input_ids, accelerator),
            shift_labels=to_device(piece.shift_labels, accelerator),
            document_starts=to_device(piece.document_starts, accelerator),
            past_key_values=cache,
            use_cache=carry_state,
            skip_logits=True,
            num_items_in_batch=1,
        )
        cache = output.past_key_values
        nats += float(output.loss)
        tokens += piece.num_scored
        after_chunk()
    return nats, tokens


def _validate_task(
    model: nn.Module,
    sets: list[TaskValidation],
    accelerator: Accelerator,
    carry_state: bool,
    layout: ProcessLayout,
    after_chunk: Callable[[], None],
) -> dict[str, Any]:
    """Validate on a synthetic task. All processes have the same number of chunks, so forward passes that are
    collective match."""
    task, lengths = sets[0].task, sets[0].lengths
    sums = np.zeros((len(lengths), 3))  # correct, scored, nats
    by_distance = np.zeros((NUM_DISTANCES, 2))  # correct, scored
    model.eval()
    for part in sets:
        cache = None
        for length, chunk in part.chunks():
            if chunk.document_starts[:, 0].any():
                cache = None
            chunk = layout.piece(chunk)
            carries = carry_state and part.piece is not None
            is_correct, nats, cache = _score(model, chunk, accelerator, cache, carries)
            sums[lengths.index(length)] += is_correct.sum(), len(is_correct), nats
            if chunk.distances is not None:
                distances = chunk.distances[chunk.shift_labels != IGNORE_INDEX]
                by_distance += sums_by_distance(distances, is_correct, None)
            after_chunk()
    model.train()
    counts = all_reduce_sum(accelerator, [*sums.ravel().tolist(), *by_distance.ravel().tolist()])
    by_distance = np.reshape(counts[sums.size :], by_distance.shape)
    sums = np.reshape(counts[: sums.size], sums.shape)
    accuracies = dict(zip(lengths, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    accuracy = accuracies.pop(IN_DISTRIBUTION)
    distances = {str(2**i): correct / num for i, (correct, num) in enumerate(by_distance.tolist()) if num}
    return {
        "loss": float(sums[0, 2] / sums[0, 1]),
        "accuracy": accuracy,
        "accuracy_scaled": task.scaled_accuracy(accuracy),
        "chance": task.chance,
        "by_length": {str(length): value for length, value in accuracies.items()},
        **({"by_distance": distances} if distances else {}),
        "validation_tokens": int(sums[0, 1]),
    }


def _score(
    model: nn.Module,
    chunk: Chunk,
    accelerator: Accelerator,
    cache: MinRNNCache | None = None,
    carry_state: bool = False,
) -> tuple[np.ndarray, float, MinRNNCache | None]:
    """Whether each answer is correct, bool [answers], their loss in nats, and the state if it is carried.

    Logits are computed only for columns that contain an answer.
    """
    scored = chunk.shift_labels != IGNORE_INDEX
    columns = np.flatnonzero(scored.any(0))
    output = model(
        input_ids=to_device(chunk.input_ids, accelerator),
        document_starts=to_device(chunk.document_starts, accelerator),
        past_key_values=cache,
        use_cache=carry_state,
        logits_to_keep=to_device(columns, accelerator),
    )
    logits = output.logits[to_device(scored[:, columns], accelerator)]  # [answers, vocab_size]
    answers = to_device(chunk.shift_labels[scored], accelerator)
    is_correct = (logits.argmax(-1) == answers).cpu().numpy()
    nats = float(nn.functional.cross_entropy(at_least_fp32(logits), answers, reduction="sum"))
    return is_correct, nats, output.past_key_values if carry_state else None


def validation_summary(result: dict[str, Any]) -> str:
    """A validation's result in a few words."""
    if "accuracy" not in result:
        return f"{result['bits_per_byte']:.4f} bits/byte"
    accuracies = result.get("by_length", {})
    by_length = "".join(f", {accuracy:.3f} at {length}" for length, accuracy in accuracies.items())
    if distances := result.get("by_distance"):
        by_length += "; by distance"
        by_length += "".join(f", {accuracy:.3f} from {least}" for least, accuracy in distances.items())
    return f"accuracy {result['accuracy']:.4f} ({result['accuracy_scaled']:.4f} scaled){by_length}"
