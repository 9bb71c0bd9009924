"""The model card of an export, README.md."""

import re
from typing import Any

import yaml

from ..data import is_labelled
from .public import public_config

NAME = "README.md"
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [minrnn, {cell}]
---

# {name}

{introduction} ({cell}, {parameters:,} parameters), \
pretrained with `minrnn` on `{corpus}`: {tokens:,} tokens{score}.
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
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
"""
RECURRENT = {
    "task": "text-generation",
    "introduction": "A minimal recurrent language model",
    "note": "Its state has a fixed size, so time and memory per token do not grow with the context.",
    "usage": GENERATION,
}
OTHER = {
    **RECURRENT,
    "introduction": "A language model",
    "note": "It is a model of `transformers`, and needs no code of `minrnn`.",
}
CLASSIFIER = {
    "task": "text-classification",
    "introduction": "A minimal recurrent classifier",
    "note": "It gives each text one label.",
    "usage": CLASSIFICATION,
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
    kind = CLASSIFIER if is_labelled(corpus) else RECURRENT if has_state else OTHER
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
    """Whether a text is exactly what `model_card` makes for some recurrent model, without changes by hand."""
    return any(_is_made_from(kind, text) for kind in (RECURRENT, CLASSIFIER))


def _is_made_from(kind: dict[str, str], text: str) -> bool:
    card = CARD
    for field, value in kind.items():
        card = card.replace(f"{{{field}}}", value)
    pattern = re.sub(r"\\\{config\\\}", lambda _: r"(?:(?!```)[\s\S])*", re.escape(card))
    pattern = re.sub(r"\\\{[\w:,]+\\\}", ".*", pattern)
    return re.fullmatch(pattern, text) is not None
