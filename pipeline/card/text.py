"""The text of a model card: metadata for the hub, then sections for people.

metadata            library, task, tags, licence, datasets, model-index (huggingface_hub's ModelCardData)
what it is          and how to load it, with transformers alone and with minrnn
training data       each corpus with revision and licence
evaluation          scores and the loss curve
limits, licence, training configuration
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ...data import BYTES, LabelledTask, build_task, is_labelled, is_task
from ..public import public_config
from ..source_settings import corpus_name
from .evaluations import evaluations_table
from .sources import UNKNOWN, data_sources, sources_table

NAME = "README.md"
NUM_TOKENS = 200  # to generate
GENERATION = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path}{trust})
tokenizer = AutoTokenizer.from_pretrained({path}{trust})
inputs = tokenizer("def main", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={count}, do_sample=True)[0]))
"""
COMMAND = """minrnn generate {name} --prompt "def main" --max-new-tokens {count}
"""
# minrnn generate has no option for a branch.
DOWNLOAD = """hf download {repo} --revision {revision} --local-dir {folder}
"""
CLASSIFICATION = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({path}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({path})
inputs = tokenizer({texts}, return_tensors="pt", padding=True)
logits = model({inputs}).logits
print(model.config.id2label[int(logits.argmax())])
"""
ONE_TEXT = {"texts": "[TEXT]", "inputs": "**inputs"}
PAIR = {
    "texts": "[TEXT, OTHER_TEXT]",
    "inputs": "**{name: value[None] for name, value in inputs.items()}",
}
STATE = "Its state has a fixed size, so time and memory per token do not grow with the context."
OTHER = "It is a model of `transformers`, and needs no code of `minrnn`."
NO_CACHE = "`generate()` has no exact cache for it, and may fail; `minrnn generate` works without one."
NO_PADDING = "Padding before a text is read as text, so give `generate()` prompts of one length."
BASE_MODEL = (
    "It continues text. It was not trained to follow instructions or to be safe: what it writes can be "
    "wrong, offensive, or copied from its training data."
)
RECALL = (
    "It remembers its context in a state of fixed size. It reads contexts of any length, but cannot repeat "
    "any part of a long one word by word, as attention can."
)
SCORES, NO_SCORES = "It was evaluated only as stated above.", "It was not evaluated."
CODE_LICENCE = "The code in this repository (`*.py`) is part of `minrnn` and has the licence Apache-2.0."


@dataclass(frozen=True)
class Generation:
    """What a language model can do when it generates."""

    has_state: bool = True
    """Of fixed size, as ours have."""
    has_exact_cache: bool = True
    skips_padding: bool = True
    max_positions: int | None = None
    """None for no limit."""


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of the model."""

    cell: str
    """Our cell, or the family."""
    parameters: int
    generation: Generation = Generation()
    """Of a language model."""


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says of the training."""

    config: dict[str, Any]
    """The resolved recipe. What must not be published is removed from the card."""
    tokens: int
    """Number of tokens that the model was trained on."""
    score: str = ""
    """A validation result, as a clause for the first sentence."""
    evaluations: Sequence[EvalResult] = ()


@dataclass(frozen=True)
class Publication:
    """Where a card is published. Without a repository, PATH stands for the model in its code."""

    repo: str | None = None
    """USER/NAME on the hub."""
    revision: str | None = None
    """Branch of the repository; None for main."""
    license: str | None = None
    """The hub's id of the weights' licence."""
    dataset_licences: Mapping[str, str] = field(default_factory=dict)
    """Licences of hub datasets, by name."""
    curve: str | None = None
    """Path of the loss curve, relative to the card."""


def model_card(
    name: str, model: ModelFacts, training: TrainingFacts, publication: Publication = Publication()
) -> str:
    """The text of a model card."""
    published = public_config(training.config)
    data = published["data"]
    kind = _classifier if is_labelled(data["corpus"]) else _language_model
    introduction, code = kind(model, data, publication)
    sources = data_sources(data, publication.dataset_licences)
    parts = [
        f"# {name}",
        introduction.format(
            cell=model.cell,
            parameters=model.parameters,
            corpus=corpus_name(data["corpus"]),
            tokens=training.tokens,
            score=training.score,
        ),
        code,
        f"## Training data\n\n{sources_table(sources)}",
        *_evaluation(training, publication),
        f"## Limits\n\n{_list(_limits(model, published, training))}",
        f"## Licence\n\n{_licence(model, publication)}",
        f"## Training configuration\n\n```yaml\n{_configuration(published)}```",
    ]
    datasets = list(dict.fromkeys(source.name for source in sources if source.is_hub))
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if is_labelled(data["corpus"]) else "text-generation",
        tags=["minrnn", model.cell],
        license=publication.license,
        datasets=datasets or None,
        model_name=name if training.evaluations else None,  # the name of its model-index
        eval_results=list(training.evaluations) or None,
    ).to_yaml()
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n"


def _language_model(model: ModelFacts, data: dict[str, Any], publication: Publication) -> tuple[str, str]:
    generation = model.generation
    limit = generation.max_positions
    count = NUM_TOKENS if limit is None else max(1, min(NUM_TOKENS, limit // 2))
    command = _block("bash", _command(publication, count))
    trust = ", trust_remote_code=True" if generation.has_state else ""
    python = _block("python", GENERATION.format(path=_path(publication), trust=trust, count=count))
    with_minrnn = f"\n\nWith `minrnn`:\n\n{command}"
    if generation.has_state:
        kind, note, code = "A minimal recurrent language model", STATE, python + with_minrnn
    else:
        kind, note, code = "A language model", OTHER, python + with_minrnn
        if not generation.has_exact_cache:
            note, code = f"{OTHER} {NO_CACHE}", command
        elif not generation.skips_padding:
            note = f"{OTHER} {NO_PADDING}"
    return _introduction(kind, "pretrained", note), code


def _classifier(model: ModelFacts, data: dict[str, Any], publication: Publication) -> tuple[str, str]:
    task = build_task(data["corpus"], data.get("task") or {})
    assert isinstance(task, LabelledTask)
    note = f"It reads {task.INPUT}. Its labels are {', '.join(task.LABELS)}."
    inputs = ONE_TEXT if task.TOWERS == 1 else PAIR
    code = _block("python", CLASSIFICATION.format(path=_path(publication), **inputs))
    return _introduction("A minimal recurrent classifier", "trained", _escaped(note)), code


def _introduction(kind: str, trained: str, note: str) -> str:
    return (
        f"{kind} ({{cell}}, {{parameters:,}} parameters), {trained} with `minrnn` on `{{corpus}}`: "
        f"{{tokens:,}} tokens{{score}}.\n{note}"
    )


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _command(publication: Publication, count: int) -> str:
    """The commands that generate a text with minrnn."""
    name = publication.repo or "PATH"
    if publication.revision is None:
        return COMMAND.format(name=name, count=count)
    folder = name.rpartition("/")[2]
    download = DOWNLOAD.format(repo=name, revision=shlex.quote(publication.revision), folder=folder)
    return download + COMMAND.format(name=folder, count=count)


def _path(publication: Publication) -> str:
    """The first arguments of `from_pretrained`."""
    if publication.repo is None:
        return "PATH"
    name = json.dumps(publication.repo)
    return f"{name}, revision={json.dumps(publication.revision)}" if publication.revision else name


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}```"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _evaluation(training: TrainingFacts, publication: Publication) -> list[str]:
    parts = [evaluations_table(training.evaluations)] if training.evaluations else []
    if publication.curve:
        parts.append(f"![Training and validation loss]({publication.curve})")
    return ["\n\n".join(["## Evaluation", *parts])] if parts else []


def _limits(model: ModelFacts, config: dict[str, Any], training: TrainingFacts) -> list[str]:
    data, batch = config["data"], config["batch"]
    scores = SCORES if training.score or training.evaluations else NO_SCORES
    if is_labelled(data["corpus"]):
        return [f"It knows only the labels of `{data['corpus']}`.", scores]
    if is_task(data["corpus"]):
        return [f"It solves the synthetic task `{data['corpus']}`; it knows no language.", scores]
    limits = [BASE_MODEL]
    if model.generation.has_state:
        limits.append(RECALL)
        carried = batch["carry_state"]
        how = "carried from one to the next" if carried else "reset at each: longer contexts are untrained"
        limits.append(f"It was trained on pieces of {batch['chunk']:,} tokens, with the state {how}.")
    if model.generation.max_positions is not None:
        limits.append(f"It reads at most {model.generation.max_positions:,} tokens.")
    limits += [f"{model.cell}: {limit}." for limit in config["model"].get("limits") or []]
    if data["tokenizer"] == BYTES:
        limits.append("Its tokens are bytes, so it writes a character outside of ASCII in several steps.")
    return [*limits, scores]


def _licence(model: ModelFacts, publication: Publication) -> str:
    if publication.license:
        sentences = [f"The weights have the licence `{publication.license}`."]
    else:
        sentences = [f"The licence of the weights is {UNKNOWN}: whoever published them stated none."]
    sentences.append("The licences of the training data are in the table above.")
    return " ".join([*sentences, *([CODE_LICENCE] if model.generation.has_state else [])])


def _configuration(published: dict[str, Any]) -> str:
    sections = {name: fields for name, fields in published.items() if name not in ("tracking", "push")}
    return yaml.safe_dump(sections, sort_keys=False)
