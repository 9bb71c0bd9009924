"""Tasks of lm-eval that need no network, and the scores that they must have."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.data import byte_tokenizer
from minrnn.models import MinRNNForCausalLM

TASKS = Path(__file__).parent / "lm_eval_tasks"
TOKENIZER = byte_tokenizer()
BOS = TOKENIZER.bos_token_id
OPTIONS = ["--include-path", str(TASKS), "--bootstrap-iters", "0", "--device", "cpu"]


def read_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def log_likelihood(model: MinRNNForCausalLM, context: str, continuation: str) -> float:
    tokens = [BOS, *(context + continuation).encode()]
    with torch.no_grad():
        logs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    first = 1 + len(context.encode())
    return sum(logs[position - 1, tokens[position]].item() for position in range(first, len(tokens)))


def expected_scores(export: Path) -> dict[str, float]:
    """Computed with forward passes only."""
    model = MinRNNForCausalLM.from_pretrained(export).eval()
    questions, documents = read_lines("questions.jsonl"), read_lines("documents.jsonl")
    chosen, answers = [], []
    for question in questions:
        values = [log_likelihood(model, question["question"], choice) for choice in question["choices"]]
        chosen.append(values.index(max(values)) == question["answer"])
        answers.append(values[question["answer"]])
    nats = -sum(log_likelihood(model, "", document["page"]) for document in documents)
    num_bytes = sum(len(document["page"].encode()) for document in documents)
    return {
        "choice": sum(chosen) / len(chosen),
        "log_perplexity": -sum(answers) / len(answers),
        "bits_per_byte": nats / num_bytes / math.log(2),
    }


def check_scores(results: dict[str, Any], export: Path) -> None:
    expected = expected_scores(export)
    assert results["tiny_choice"]["acc,none"] == pytest.approx(expected["choice"])
    assert math.log(results["tiny_completion"]["perplexity,none"]) == pytest.approx(
        expected["log_perplexity"], rel=1e-5
    )
