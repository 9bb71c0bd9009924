"""A model by its name (a run, an export or a hub id), in a dtype, on a device; for all commands that read
one."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..common.errors import UserError
from ..common.output import warn
from ..data.tokenizer import needs_code_trust
from ..models import MinRNNConfig, MinRNNForCausalLM
from ..models.dtypes import DTYPES
from .machine import CHOICES, choose_precision, device_name, measure_rates, resolve_device, supports

# In config.json, of transformers itself.
NOT_SETTINGS = {
    "architectures",
    "auto_map",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}
SENTENCE = "Any tokenizer of text can spell this sentence."


def model_folder(name: str) -> str:
    """A run's folder stands for the model it exported; any other name for itself.

    Raises:
        UserError: a run that has exported none yet.
    """
    name = os.path.expanduser(name)
    run = Path(name)
    if (run / "model" / "config.json").exists():
        return str(run / "model")
    if (run / "checkpoints").is_dir():
        raise UserError(
            "MODEL",
            f"the run {name} has no model/ yet; minrnn export {name} --out DIR makes one of its newest checkpoint",
        )
    return name


def load(
    name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[MinRNNForCausalLM, Any]:
    """Model, in eval mode on its device, and tokenizer of an export, a hub id or a run.

    Args:
        dtype: auto, fp32, bf16 or fp64, as in `place`.
        device: as in `machine.resolve_device`.
        trust_remote_code: as in `read_model`.

    Raises: UserError: they cannot be loaded, are none of ours, or belong to another version of the code;
        there is no such
            device, or it does not support the dtype.
    """
    target = resolve_device(device)  # the quickest mistake first
    model, tokenizer = read_model(name, trust_remote_code)
    place(model, weights_dtype(model.dtype, dtype, target), target)
    return model, tokenizer


def weights_dtype(stored: torch.dtype, asked: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in on a device.

    `auto` loses no digit and no time: weights stay as they are stored, but bf16 becomes fp32 where the device
    multiplies that faster. What was asked for is taken, with a warning where it is slow.

    Raises:
        UserError: an unknown dtype, or one that the device does not support.
    """
    if asked not in ("auto", *DTYPES):
        raise UserError("--dtype", f"must be auto, {', '.join(DTYPES)}, not {asked}")
    if asked == "auto" and stored == torch.float64:
        if not supports(device, "fp64"):
            unsupported = f"{device_name(device)} does not support fp64, in which the weights are stored"
            raise UserError("--dtype", f"{unsupported}; use --dtype fp32")
        return stored
    if asked == "auto" and stored != torch.bfloat16:
        return torch.float32
    rates = measure_rates(device, [*CHOICES, asked] if asked in DTYPES else CHOICES)
    choice = choose_precision(asked, None, rates, device_name(device), "--dtype")
    if choice.warning:
        warn(choice.warning)
    return DTYPES[choice.precision]


def place(model: MinRNNForCausalLM, dtype: torch.dtype, device: torch.device) -> None:
    """Bring a model to a dtype and a device."""
    nn.Module.to(model, device=device, dtype=dtype)


def read_model(name: str, trust_remote_code: bool = False) -> tuple[MinRNNForCausalLM, Any]:
    """Model, in eval mode on the CPU as it is stored, and tokenizer of an export, a hub id or a run.

    Args: trust_remote_code: run the code that the tokenizer brings along. The model's own is that of this
        package, whatever it brings.

    Raises: UserError: they cannot be loaded, are none of ours, belong to another version of the code, do not
        fit into
            memory, or bring code that is not trusted.
    """
    folder = model_folder(name)
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        if values.get("model_type") != "minrnn":
            raise UserError(
                "MODEL", f"{name} is a {values.get('model_type')} model; lm_eval --model hf evaluates it"
            )
        _check_size(name, MinRNNConfig.from_dict(values))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # the hub's client, the file system and the configuration each raise their own
        message = " ".join(str(error).split())[:300]
        raise UserError("MODEL", f"cannot load {name}: {message}") from None
    model, found = loaded
    found = {**found, "unknown setting": values.keys() - MinRNNConfig().to_dict().keys() - NOT_SETTINGS}
    strange = [
        f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, keys))[:3])}"
        for kind, keys in found.items()
        if keys
    ]
    if strange:
        raise UserError(
            "MODEL",
            f"{name} was exported by another version of minrnn ({'; '.join(strange)}); lm_eval --model hf runs the code it carries",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # what transformers raises where there is none
        if needs_code_trust(error):
            told = f"the tokenizer of {name} brings code of its own, which is not run; read it, and add --trust-remote-code to run it"
            raise UserError("MODEL", told) from None
        raise UserError(
            "MODEL", f"{name} has no tokenizer; minrnn export writes one beside the weights"
        ) from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(
            "MODEL", f"the tokenizer of {name} has no bos or no eos token, between which a document stands"
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer.encode(
        SENTENCE, add_special_tokens=False
    ):
        raise UserError(
            "MODEL",
            f"the tokenizer of {name} cannot spell text (a synthetic task's vocabulary?), so none can be scored",
        )
    return model.eval(), tokenizer


def _check_size(name: str, config: MinRNNConfig) -> None:
    """Refuse a configuration whose weights no memory here holds, before any of it is taken.

    Counted on the meta device, from the model with one layer and with two: a loop over the layers asked for
    might never end.

    Raises:
        UserError: it asks for more than the machine has.
    """
    sizes = []
    for num_layers in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers = num_layers
        try:
            with torch.device("meta"):
                sizes.append(MinRNNForCausalLM(small).num_parameters())
        except (RuntimeError, OverflowError):  # torch's: sizes beyond 64 bits
            raise UserError(
                "MODEL", f"{name} is larger than can be counted, by its config.json; is it of this model?"
            ) from None
    needed = 4 * (sizes[0] + (config.num_hidden_layers - 1) * (sizes[1] - sizes[0]))
    if (memory := _main_memory()) is not None and needed > memory:
        told = f"needs {needed / 1e9:,.0f} GB for weights in fp32, by its config.json, of {memory / 1e9:,.0f} GB here"
        raise UserError("MODEL", f"{name} {told}; is that config.json of this model?")


def _main_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
