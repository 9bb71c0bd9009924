"""The model card of an export, README.md."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from ..data import LabelledTask, build_task, is_labelled
from .public import public_config
from .source_settings import corpus_name

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

```{language}
{usage}```

## Training configuration

```yaml
{config}```
"""

GENERATION = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH{trust})
tokenizer = AutoTokenizer.from_pretrained(PATH{trust})
inputs = tokenizer("def main", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={count}, do_sample=True)[0]))
"""
COMMAND = """minrnn generate PATH --prompt "def main" --max-new-tokens {count}
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
NUM_TOKENS = 200  # to generate
RECURRENT = {
    "task": "text-generation",
    "introduction": "A minimal recurrent language model",
    "trained": "pretrained",
    "note": "Its state has a fixed size, so time and memory per token do not grow with the context.",
    "language": "python",
    "usage": GENERATION.format(trust=", trust_remote_code=True", count=NUM_TOKENS),
}
OTHER = "It is a model of `transformers`, and needs no code of `minrnn`."
NO_CACHE = "`generate()` has no exact cache for it, and may fail; `minrnn generate` works without one."
NO_PADDING = "Padding before a text is read as text, so give `generate()` prompts of one length."


@dataclass(frozen=True)
class Generation:
    """What a language model can do when it generates."""

    has_state: bool = True
    """Of fixed size, as ours have."""
    has_exact_cache: bool = True
    skips_padding: bool = True
    max_positions: int | None = None
    """None for no limit."""


def _language_model(generation: Generation) -> dict[str, str]:
    if generation.has_state:
        return RECURRENT
    limit = generation.max_positions
    count = NUM_TOKENS if limit is None else max(1, min(NUM_TOKENS, limit // 2))
    notes, texts = [OTHER], {"language": "python", "usage": GENERATION.format(trust="", count=count)}
    if not generation.has_exact_cache:
        notes, texts = [*notes, NO_CACHE], {"language": "bash", "usage": COMMAND.format(count=count)}
    elif not generation.skips_padding:
        notes.append(NO_PADDING)
    return {**RECURRENT, "introduction": "A language model", "note": " ".join(notes), **texts}


def _classifier(corpus: str, options: dict[str, Any]) -> dict[str, str]:
    task = build_task(corpus, options)
    assert isinstance(task, LabelledTask)
    return {
        "task": "text-classification",
        "introduction": "A minimal recurrent classifier",
        "trained": "trained",
        "note": f"It reads {task.INPUT}. Its labels are {', '.join(task.LABELS)}.",
        "language": "python",
        "usage": ONE_TEXT if task.TOWERS == 1 else PAIR,
    }


def model_card(
    name: str,
    cell: str,
    parameters: int,
    tokens: int,
    score: str,
    config: dict[str, Any],
    generation: Generation = Generation(),
) -> str:
    """The text of a model card.

    Args:
        cell: our cell, or the family.
        tokens: number of tokens that the model was trained on.
        score: a validation result, as a clause for the first sentence.
        config: the resolved recipe; what must not be published is removed.
        generation: of a language model.
    """
    published = public_config(config)
    corpus = published["data"]["corpus"]
    sections = {section: fields for section, fields in published.items() if section != "tracking"}
    text = yaml.safe_dump(sections, sort_keys=False)
    if is_labelled(corpus):
        kind = _classifier(corpus, published["data"].get("task") or {})
    else:
        kind = _language_model(generation)
    return CARD.format(
        name=name,
        cell=cell,
        parameters=parameters,
        corpus=corpus_name(corpus),
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
