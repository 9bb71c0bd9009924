"""A model by its name - a run, an export, a hub id - on its device, and where what is found out about it goes."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..data.errors import UserError
from ..models import MinRNNConfig, MinRNNForCausalLM

NOT_SETTINGS = {"architectures", "auto_map", "model_type", "torch_dtype", "transformers_version"}  # in config.json, of transformers itself
SENTENCE = "Any tokenizer of text can spell this sentence."
DTYPES = ("auto", "float32", "bfloat16", "float64")  # of the weights; auto: as they are stored


def model_folder(name: str) -> str:
    """A run's folder stands for the model it exported; any other name for itself.

    Raises:
        UserError: a run that has exported none yet.
    """
    run = Path(name)
    if (run / "model" / "config.json").exists():
        return str(run / "model")
    if (run / "checkpoints").is_dir():
        raise UserError(("MODEL", f"the run {name} has no model/ yet; minrnn export {name} --out DIR makes one of its newest checkpoint"))
    return name


def load(name: str, dtype: str = "auto") -> tuple[MinRNNForCausalLM, Any]:
    """Model, in eval mode on the CPU, and tokenizer of an export, a hub id or a run.

    Raises:
        UserError: they cannot be loaded, are none of ours, or belong to another version of the code.
    """
    folder = model_folder(name)
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        if values.get("model_type") != "minrnn":
            raise UserError(("MODEL", f"{name} is a {values.get('model_type')} model; lm_eval --model hf evaluates it"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # the hub's client, the file system and the configuration each raise their own
        message = " ".join(str(error).split())[:300]
        raise UserError(("MODEL", f"cannot load {name}: {message}")) from None
    model, found = loaded
    found = {**found, "unknown setting": values.keys() - MinRNNConfig().to_dict().keys() - NOT_SETTINGS}
    strange = [f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, keys))[:3])}" for kind, keys in found.items() if keys]
    if strange:
        raise UserError(
            ("MODEL", f"{name} was exported by another version of minrnn ({'; '.join(strange)}); lm_eval --model hf runs the code it carries")
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # what transformers raises where there is none
        raise UserError(("MODEL", f"{name} has no tokenizer; minrnn export writes one beside the weights")) from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(("MODEL", f"the tokenizer of {name} has no bos or no eos token, between which a document stands"))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer.encode(SENTENCE, add_special_tokens=False):
        raise UserError(("MODEL", f"the tokenizer of {name} cannot spell text (a synthetic task's vocabulary?), so none can be scored"))
    return model.eval(), tokenizer


def to_device(model: MinRNNForCausalLM, device: str | None) -> MinRNNForCausalLM:
    """The model on a device; by default the accelerator, if there is one.

    Raises:
        UserError: there is no such device.
    """
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        nn.Module.to(model, torch.device(device) if device else default or torch.device("cpu"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(("--device", f"cannot use {device}: {str(error).splitlines()[0]}; --device cpu is always there")) from None
    return model


def run_of(model: str) -> Path | None:
    """The folder of the run whose model this is: the run itself, or its model/."""
    path = Path(model)
    for folder in (path, path.resolve().parent) if path.resolve().name == "model" else (path,):
        if (folder / "config.yaml").exists() and (folder / "model" / "config.json").exists():
            return folder
    return None


def out_problems(out: Path | None) -> list[tuple[str, str]]:
    """What is wrong with a JSON file that is to be written at the end of long work, found before it begins; its folder is made."""
    if out is None:
        return []
    if out.suffix != ".json":
        return [("--out", f"{out} must end in .json")]
    if out.is_dir():
        return [("--out", f"{out} is a folder; name a file")]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            return []
    except OSError as error:
        return [("--out", f"cannot write {out} ({error.strerror})")]


def default_out(model: str, what: str) -> Path:
    """Where results go unless it is said: among those of the model's run, or in evals/results/ without a run."""
    run = run_of(model)
    return (Path("evals", "results") if run is None else run / "evals") / f"{what}-{time.strftime('%Y%m%dT%H%M%S')}.json"
