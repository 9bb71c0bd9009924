"""The model card of an export, README.md."""

import re
from typing import Any

import yaml

from ..data import LabelledTask, build_task, is_labelled
from .public import public_config

NAME = "README.md"
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [minrnn, {cell}]
---

# {name}

{introduction} ({cell}, {parameters:,} parameters), \
{trained} with `minrnn` on `{corpus}`: {tokens:,} tokens{score}.
{note}

```python
{usage}```

## Training configuration

```yaml
{config}```
"""

GENERATION = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def main", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0]))
"""
CLASSIFICATION = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer({texts}, return_tensors="pt", padding=True)
logits = model({inputs}).logits
print(model.config.id2label[int(logits.argmax())])
"""
ONE_TEXT = CLASSIFICATION.format(texts="[TEXT]", inputs="**inputs")
PAIR = CLASSIFICATION.format(
    texts="[TEXT, OTHER_TEXT]", inputs="**{name: value[None] for name, value in inputs.items()}"
)
RECURRENT = {
    "task": "text-generation",
    "introduction": "A minimal recurrent language model",
    "trained": "pretrained",
    "note": "Its state has a fixed size, so time and memory per token do not grow with the context.",
    "usage": GENERATION,
}
OTHER = {
    **RECURRENT,
    "introduction": "A language model",
    "note": "It is a model of `transformers`, and needs no code of `minrnn`.",
    "usage": GENERATION.replace(", trust_remote_code=True", ""),
}


def _classifier(corpus: str, options: dict[str, Any]) -> dict[str, str]:
    task = build_task(corpus, options)
    assert isinstance(task, LabelledTask)
    return {
        "task": "text-classification",
        "introduction": "A minimal recurrent classifier",
        "trained": "trained",
        "note": f"It reads {task.INPUT}. Its labels are {', '.join(task.LABELS)}.",
        "usage": ONE_TEXT if task.TOWERS == 1 else PAIR,
    }


def model_card(
    name: str,
    cell: str,
    parameters: int,
    tokens: int,
    score: str,
    config: dict[str, Any],
    has_state: bool = True,
) -> str:
    """The text of a model card.

    Args:
        cell: our cell, or the family.
        tokens: number of tokens that the model was trained on.
        score: a validation result, as a clause for the first sentence.
        config: the resolved recipe; what must not be published is removed.
        has_state: whether the model has a state of fixed size.
    """
    published = public_config(config)
    corpus = published["data"]["corpus"]
    sections = {section: fields for section, fields in published.items() if section != "tracking"}
    text = yaml.safe_dump(sections, sort_keys=False)
    kind = RECURRENT if has_state else OTHER
    if is_labelled(corpus):
        kind = _classifier(corpus, published["data"].get("task") or {})
    return CARD.format(
        name=name,
        cell=cell,
        parameters=parameters,
        corpus=corpus,
        tokens=tokens,
        score=score,
        config=text,
        **kind,
    )


def is_card(text: str) -> bool:
    """Whether a text is exactly what `model_card` makes for some recurrent language model, without changes
    by hand."""
    card = CARD
    for field, value in RECURRENT.items():
        card = card.replace(f"{{{field}}}", value)
    pattern = re.sub(r"\\\{config\\\}", lambda _: r"(?:(?!```)[\s\S])*", re.escape(card))
    pattern = re.sub(r"\\\{[\w:,]+\\\}", ".*", pattern)
    return re.fullmatch(pattern, text) is not None
