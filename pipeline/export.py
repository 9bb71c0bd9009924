"""From a checkpoint to a model that loads anywhere, and a look at what it writes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..data import UserError, tokenizer_of, with_bos
from ..models import MinRNNConfig, MinRNNForCausalLM
from .checkpoint import checkpoint_name, load_parameters, newest_valid, read_manifest
from .public import public_config
from .storage import sync

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [minrnn, {cell}]
---

# {name}

A minimal recurrent language model ({cell}, {parameters:,} parameters), pretrained with `minrnn` on `{corpus}`: {tokens:,} tokens{score}.
Its state has a fixed size, so time and memory per token do not grow with the context.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def main", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0]))
```

## Training configuration

```yaml
{config}```
"""


def export_model(model: PreTrainedModel, tokenizer: Any, folder: Path, config: dict[str, Any], tokens: int, score: str = "") -> None:
    """Write weights, configuration, the modeling code, tokenizer and a model card; the folder appears whole or not at all.

    Args:
        folder: is replaced if it exists.
        config: the resolved recipe.
        tokens: tokens trained on.
        score: how good it is, for the card.
    """
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    published = public_config(config)
    card = CARD.format(
        name=folder.resolve().parent.name if folder.name == "model" else folder.name,
        cell=model.config.cell,
        parameters=model.num_parameters(),
        corpus=published["data"]["corpus"],
        tokens=tokens,
        score=score,
        config=yaml.safe_dump({name: section for name, section in published.items() if name != "tracking"}, sort_keys=False),
    )
    (building / "README.md").write_text(card)
    for file in building.iterdir():
        sync(file)
    if folder.exists():
        grave = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(grave, ignore_errors=True)
        os.rename(folder, grave)
        os.rename(building, folder)
        shutil.rmtree(grave)
    else:
        os.rename(building, folder)


def model_config(fields: dict[str, Any], tokenizer: Any, vocab_size: int) -> MinRNNConfig:
    """The configuration of a run's model: the recipe's fields and the tokenizer's tokens."""
    return MinRNNConfig(
        **fields,
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _may_be_replaced(path: Path) -> bool:
    """An empty folder, or an export."""
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or (
        (path / "config.json").exists() and json.loads((path / "config.json").read_text()).get("model_type") == "minrnn"
    )


def export_run(run: Path, out: Path, step: int | None = None, dtype: str = "fp32") -> Path:
    """Export a checkpoint of a run, the newest valid one or that of `step`; returns the checkpoint.

    Raises:
        UserError: no run, no such checkpoint, or one that was changed.
    """
    folder, out = run / "checkpoints", out.resolve()
    if out.exists() and not _may_be_replaced(out):
        raise UserError(("--out", f"{out} exists and is no export; name another folder"))
    if step is None:
        found = newest_valid(folder, warn=print)
        if found is None:
            raise UserError(("RUN", f"{run} holds no valid checkpoint"))
        path, manifest = found
    else:
        path = folder / checkpoint_name(step)
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError) as error:
            available = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
            raise UserError(("--step", f"{error}; checkpoints there: {available}")) from None
    model, tokenizer, config = load_checkpoint(path, manifest["vocab_size"], dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    export_model(model, tokenizer, out, config, manifest["tokens"])
    return path


def load_checkpoint(path: Path, vocab_size: int, dtype: str) -> tuple[MinRNNForCausalLM, Any, dict[str, Any]]:
    """The model of a checkpoint, its tokenizer and the resolved recipe."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    tokenizer = tokenizer_of(config["data"]["corpus"], config["data"]["tokenizer"], config["data"].get("task"))
    fields = {name: value for name, value in config["model"].items() if name not in ("preset", "init_from")}
    model = MinRNNForCausalLM(model_config(fields, tokenizer, vocab_size))
    nn.Module.to(model, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype])
    load_parameters(path, model)
    return model, tokenizer, config


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: Any, prompts: list[str], num_tokens: int, seed: int) -> list[str]:
    """A continuation of each prompt, prompt included, drawn at temperature 0.8; leaves the global random state as it was."""
    inputs = tokenizer([with_bos(tokenizer, prompt) for prompt in prompts], return_tensors="pt", padding=True, return_token_type_ids=False).to(
        model.device
    )
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generate: Any = model.generate
        drawn = {"do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
        ids = generate(**inputs, max_new_tokens=num_tokens, synced_gpus=False, **drawn)  # ZeRO-3 or not, this process is alone with it
    model.train(was_training)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
