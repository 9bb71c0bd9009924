"""Export a checkpoint as a `transformers` model, and generate samples from it."""

import json
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..common.errors import UserError
from ..common.output import warn
from ..data import TextStream, num_token_ids, prompt_batch, prompt_tokens, run_tokenizer
from ..models import MinRNNForCausalLM, MinRNNForSequenceClassification
from ..models.dtypes import DTYPES
from ..models.export_format import EXPORT_FORMAT
from . import card
from .checkpoint import checkpoint_name, load_parameters, newest_valid, read_manifest
from .classification import classifier_fields, new_model
from .export_folder import CONFIG, check_export, write_export
from .families.decoding import FamilyDecoder, has_exact_cache
from .families.limits import NO_PADDING
from .families.registry import CARRYING, OURS, config_of, max_positions
from .families.saved import saved_defaults
from .model_section import saved_fields

TEMPERATURE = 0.8  # of samples
NO_SHARDS = "100TB"  # max_shard_size, so that the weights are one file


def export_model(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    config: dict[str, Any],
    tokens: int,
    score: str = "",
    key: str = "run.dir",
    force: bool = False,
) -> bool:
    """Write weights, configuration, modeling code, tokenizer and model card (`export_folder.write_export`).

    Args:
        folder: is created, or holds an export whose files are replaced; other files in it stay.
        config: the resolved recipe.
        tokens: number of tokens that the model was trained on.
        score: a validation result for the card.
        key: the setting that names the folder, for messages.
        force: also replace files that no export wrote.

    Returns:
        Whether the card was written. A card that was changed by hand is kept.

    Raises:
        UserError: a file to replace was not written by an export, or was changed since.
    """
    name = folder.resolve().parent.name if folder.name == "model" else folder.name
    training = card.TrainingFacts(config, tokens, score)
    text = card.model_card(name, model_facts(model, config), training)

    def write(staged: Path) -> None:
        write_model(model, tokenizer, staged)
        (staged / card.NAME).write_text(text)

    return write_export(folder, write, key, force)


def write_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write weights, configuration, modeling code and tokenizer to a folder."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=padding_ids(model, tokenizer),
    )
    model.save_pretrained(folder, max_shard_size=NO_SHARDS)
    values = json.loads((folder / CONFIG).read_text())
    values["export_format"] = EXPORT_FORMAT
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def model_facts(model: PreTrainedModel, config: dict[str, Any]) -> card.ModelFacts:
    """What the card says of a model.

    Args:
        config: the resolved recipe.
    """
    kind = getattr(model.config, "cell", model.config.model_type)
    generation = _generation(model, config["model"].get("limits") or [])
    return card.ModelFacts(kind, model.num_parameters(), generation)


def _generation(model: PreTrainedModel, limits: list[str]) -> card.Generation:
    if isinstance(model, MinRNNForCausalLM | MinRNNForSequenceClassification):
        return card.Generation()
    was_training = model.training
    has_cache = has_exact_cache(model.eval())
    model.train(was_training)
    return card.Generation(False, has_cache, NO_PADDING not in limits, max_positions(model.config))


def model_config(
    fields: dict[str, Any], tokenizer: Any, vocab_size: int, family: str = OURS, mask: bool = False
) -> Any:
    """The configuration of a run's model, from the recipe's fields and the tokenizer's special tokens.

    Args:
        mask: give the padding of the vocabulary no probability, as new runs do. Families of transformers
            cannot.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if family in CARRYING and mask:
        special["num_tokens"] = num_token_ids(tokenizer)
    return config_of(family, {**fields, **special, "vocab_size": vocab_size})


def masks_padding(config: Any) -> bool:
    """Whether a model gives the padding of its vocabulary no probability."""
    return getattr(config, "num_tokens", None) is not None


def padding_ids(model: PreTrainedModel, tokenizer: Any) -> list[int] | None:
    """Ids that pad the vocabulary and that generation must suppress; None if there are none, or the model
    masks them itself."""
    config = model.config.get_text_config()
    num_tokens = num_token_ids(tokenizer)
    if masks_padding(config) or config.vocab_size <= num_tokens:
        return None
    return list(range(num_tokens, config.vocab_size))


def export_run(
    run: Path,
    out: Path,
    step: int | None = None,
    dtype: str = "fp32",
    force: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Export a checkpoint of a run, the newest valid one or that of `step`; returns the checkpoint.

    Args:
        trust_remote_code: run the code that the tokenizer contains, whatever the run's config.yaml says.

    Raises:
        UserError: there is no such run or valid checkpoint, or as `export_model`.
    """
    out = out.resolve()
    check_export(out, "--out", force)
    path, manifest = find_checkpoint(run, step)
    mask = manifest.get("masks_padding", False)
    model, tokenizer, config = load_checkpoint(path, manifest["vocab_size"], dtype, trust_remote_code, mask)
    if not export_model(model, tokenizer, out, config, manifest["tokens"], key="--out", force=force):
        warn(kept_card_warning(out))
    return path


def find_checkpoint(run: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a run and its manifest: that of a step, or the newest valid one if that is None.

    Raises:
        UserError: there is no such run, or no such valid checkpoint.
    """
    if not run.is_dir():
        raise UserError("RUN", f"there is no folder {run}; name the folder of a run")
    folder = run / "checkpoints"
    if step is None:
        newest = newest_valid(folder, warn)
        if newest is None:
            raise UserError(
                "RUN", f"{run} holds no valid checkpoint; name the folder of a run that has saved one"
            )
        return newest
    path = folder / checkpoint_name(step)
    available = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
    if not path.is_dir():
        raise UserError("--step", f"{run} has no checkpoint of step {step}; those there: {available}")
    try:
        return path, read_manifest(path)
    except (OSError, ValueError) as error:
        raise UserError("--step", f"{error}; checkpoints there: {available}") from None


def kept_card_warning(folder: Path) -> str:
    """The warning about a card that was kept."""
    return (
        f"{folder / card.NAME} is not as an export wrote it and is kept; "
        "remove it and export again for a new model card"
    )


def load_checkpoint(
    path: Path, vocab_size: int, dtype: str, trust_remote_code: bool = False, mask: bool = False
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """The model of a checkpoint, its tokenizer and its resolved recipe.

    Args:
        vocab_size, mask: `vocab_size` and `masks_padding` of the checkpoint's manifest.
    """
    config = yaml.safe_load((path / "config.yaml").read_text())
    tokenizer = run_tokenizer(
        config["data"]["corpus"], config["data"]["tokenizer"], config["data"].get("task"), trust_remote_code
    )
    family, fields = saved_fields(config["model"])
    fields = saved_defaults(family, path) | fields
    fields |= classifier_fields(config["data"]["corpus"], config["data"].get("task"))
    model = new_model(family, model_config(fields, tokenizer, vocab_size, family, mask))
    nn.Module.to(model, DTYPES[dtype])
    load_parameters(path, model)
    return model, tokenizer, config


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], num_tokens: int, seed: int
) -> list[str]:
    """A continuation of each prompt, prompt included, sampled at temperature 0.8. The global random state is
    unchanged."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, MinRNNForCausalLM):
            rows = _generate(model, tokenizer, prompts, num_tokens)
        else:
            rows = [_decode(model, tokenizer, prompt, num_tokens) for prompt in prompts]
    model.train(was_training)
    return [prompt + _continuation(tokenizer, *row) for prompt, row in zip(prompts, rows, strict=True)]


def _generate(
    model: MinRNNForCausalLM, tokenizer: Any, prompts: list[str], num_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """(tokens of the prompt, new tokens) of each prompt."""
    inputs, generate = prompt_batch(tokenizer, prompts).to(model.device), cast(Any, model).generate
    options = {
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # synced_gpus: also under ZeRO-3, only this process generates.
    ids = generate(**inputs, max_new_tokens=num_tokens, synced_gpus=False, **options)
    length = inputs["input_ids"].shape[1]
    return [(row[:length], row[length:]) for row in ids.tolist()]


def _decode(
    model: PreTrainedModel, tokenizer: Any, prompt: str, num_tokens: int
) -> tuple[list[int], list[int]]:
    """The same for one prompt and a model of transformers, without padding, which not all can skip."""
    ids, new = prompt_tokens(tokenizer, prompt), []
    limit = max_positions(model.config)
    step = FamilyDecoder(model, torch.tensor([ids]))
    logits = step.logits
    for count in range(num_tokens if limit is None else min(num_tokens, limit - len(ids))):
        token = torch.multinomial((logits.float() / TEMPERATURE).softmax(-1), 1).squeeze(1)
        new.append(int(token))
        if new[-1] == tokenizer.eos_token_id or count + 1 == num_tokens:
            break
        logits = step(token)
    return ids, new


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens that follow a prompt."""
    stream = TextStream(tokenizer, prompt)
    return stream.write(new) + stream.end()
