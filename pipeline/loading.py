"""Load a model by its name (a run, an export or a hub id), in a dtype, on a device. Every command that reads
a model uses this."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..common.errors import UserError, one_line_message
from ..common.output import warn
from ..data.tokenizer import needs_code_trust
from ..models import MinRNNConfig, MinRNNForCausalLM, MinRNNForSequenceClassification, TorchRNNConfig
from ..models.dtypes import DTYPES
from ..models.export_format import check_export_format
from .code_trust import brings_code, require_code_trust
from .families.build import causal_lm, check_memory
from .families.limits import abilities
from .families.registry import family_names
from .machine import (
    CHOICES,
    choose_precision,
    device_name,
    main_memory,
    measure_rates,
    resolve_device,
    supports,
)

OWN_CONFIGS: dict[str, Any] = {"minrnn": MinRNNConfig, "torch_rnn": TorchRNNConfig}
# Fields of config.json that transformers and exports add.
NOT_SETTINGS = {
    "architectures",
    "auto_map",
    "export_format",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}
SENTENCE = "Any tokenizer of text can spell this sentence."


def model_folder(name: str, key: str = "MODEL") -> str:
    """The model that a run exported, if the name is a run's folder; any other name unchanged.

    Raises:
        UserError: the run has not exported a model yet.
    """
    name = os.path.expanduser(name)
    run = Path(name)
    if (run / "model" / "config.json").exists():
        return str(run / "model")
    if (run / "checkpoints").is_dir():
        raise UserError(
            key,
            f"the run {name} has no model/ yet; minrnn export {name} --out DIR makes one of its newest "
            "checkpoint",
        )
    return name


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    spells_text: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load the model (in eval mode) and the tokenizer of an export, a hub id or a run, of any family.

    Args:
        dtype: auto, fp32, bf16 or fp64, as in `weights_dtype`.
        device: as in `machine.resolve_device`.
        trust_remote_code, spells_text: as in `read_model`.

    Raises:
        UserError: as `read_model`; or the device does not exist or does not support the dtype.
    """
    target = resolve_device(device)  # before the slow part, so that a wrong name fails early
    model, tokenizer = read_model(name, trust_remote_code, spells_text)
    move_model(model, weights_dtype(model.dtype, dtype, target), target)
    return model, tokenizer


def weights_dtype(stored: torch.dtype, requested: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in on a device.

    `auto` loses neither precision nor time: it is the stored dtype, except that bf16 weights become fp32 if
    the device multiplies fp32 faster. A requested dtype is used, with a warning if it is slow.

    Raises:
        UserError: an unknown dtype, or one that the device does not support.
    """
    if requested not in ("auto", *DTYPES):
        raise UserError("--dtype", f"must be auto, {', '.join(DTYPES)}, not {requested}")
    if requested == "auto" and stored == torch.float64:
        if not supports(device, "fp64"):
            unsupported = f"{device_name(device)} does not support fp64, in which the weights are stored"
            raise UserError("--dtype", f"{unsupported}; use --dtype fp32")
        return stored
    if requested == "auto" and stored != torch.bfloat16:
        return torch.float32
    rates = measure_rates(device, [*CHOICES, requested] if requested in DTYPES else CHOICES)
    choice = choose_precision(requested, None, rates, device_name(device), "--dtype")
    if choice.warning:
        warn(choice.warning)
    return DTYPES[choice.precision]


def move_model(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Convert a model to a dtype and move it to a device."""
    nn.Module.to(model, device=device, dtype=dtype)


def read_model(
    name: str, trust_remote_code: bool = False, spells_text: bool = True
) -> tuple[PreTrainedModel, Any]:
    """Read the model, in eval mode on the CPU in its stored dtype, and the tokenizer of an export, a hub id
    or a run.

    Args:
        trust_remote_code: run code that the model or the tokenizer contains. A model of minrnn always runs
            the code of this package, and one that transformers knows the code of transformers. Without it, a
            person at the terminal is asked.
        spells_text: refuse the vocabulary of a synthetic task.

    Raises:
        UserError: they cannot be loaded, are of another kind or another version of the code, do not fit into
            memory, or contain code that is not trusted.
    """
    model = read_weights(name, trust_remote_code=trust_remote_code)
    needs_both = isinstance(model, MinRNNForCausalLM)
    tokenizer = _read_tokenizer(name, model_folder(name), trust_remote_code, needs_both)
    if spells_text:
        _require_text(name, tokenizer)
    return model.eval(), tokenizer


def is_classifier(values: dict[str, Any]) -> bool:
    """Whether a config.json is that of a `MinRNNForSequenceClassification`."""
    is_ours = values.get("model_type") == MinRNNConfig.model_type
    return is_ours and "MinRNNForSequenceClassification" in (values.get("architectures") or [])


def read_weights(
    name: str, key: str = "MODEL", wants_classifier: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Read the model of an export, a hub id or a run, on the CPU in its stored dtype.

    Args:
        key: the setting that names the model, for errors.
        wants_classifier: read a `MinRNNForSequenceClassification`, not a language model.
        trust_remote_code: as in `read_model`.

    Raises:
        UserError: as `read_model`.
    """
    folder = model_folder(name, key)
    runs_its_code = False
    model_class: Any = MinRNNForSequenceClassification if wants_classifier else AutoModelForCausalLM
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        if key == "MODEL" and not wants_classifier and brings_code(values, OWN_CONFIGS):
            require_code_trust(name, "model", values["auto_map"].values(), trust_remote_code)
            runs_its_code = True
        else:
            _check_kind(name, values, key, wants_classifier)
        check_export_format(values.get("export_format"))
        own_config = OWN_CONFIGS.get(values["model_type"])
        if own_config is not None:
            build = MinRNNForSequenceClassification if wants_classifier else causal_lm
            _check_size(name, own_config.from_dict(values), build, key)
        elif not runs_its_code:  # such a model cannot be counted without running it
            _check_memory(folder, key)
        loaded: Any = model_class.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=runs_its_code
        )
    except UserError:
        raise
    except Exception as error:  # the hub's client, the file system and the configuration each raise their own
        raise UserError(key, f"cannot load {name}: {one_line_message(error)}") from None
    model, loading_info = loaded
    if own_config is None:  # models of the hub may hold more than they need
        loading_info.pop("unexpected_keys", None)
    else:
        loading_info["unknown setting"] = values.keys() - own_config().to_dict().keys() - NOT_SETTINGS
    differences = _differences(loading_info)
    if differences and own_config is None:
        raise UserError(key, f"the weights of {name} do not fit its config.json ({differences})")
    if differences:
        message = f"{name} was exported by another version of minrnn ({differences})"
        evaluates = "; lm_eval --model hf runs the code it carries" if key == "MODEL" else ""
        raise UserError(key, message + ("" if wants_classifier else evaluates))
    return model


def _check_kind(name: str, values: dict[str, Any], key: str, wants_classifier: bool) -> None:
    """Check that a config.json is that of a language model, or of a classifier of ours.

    Raises:
        UserError: it is not.
    """
    model_type = str(values.get("model_type"))
    is_language_model = model_type in (*OWN_CONFIGS, *family_names())
    if is_classifier(values) and not wants_classifier:
        use = (
            f"minrnn eval {name} --tasks lra/NAME evaluates it"
            if key == "MODEL"
            else "a run starts from the weights of a language model"
        )
        raise UserError(key, f"{name} is a classifier, not a language model; {use}")
    if not is_classifier(values) and wants_classifier:
        kind = "a language model" if is_language_model else f"a {model_type} model"
        message = f"{name} is {kind}; tasks of Long Range Arena are for classifiers trained on one"
        raise UserError(key, f"{message} (minrnn train --config lra-listops)")
    if not is_language_model:
        raise UserError(key, f"{name} is a {model_type} model, which is no causal language model")


def _differences(loading_info: dict[str, Any]) -> str:
    """What transformers reports of a load, in words; empty if nothing is missing or differs."""
    return "; ".join(
        f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, keys))[:3])}"
        for kind, keys in loading_info.items()
        if keys
    )


def family_limits(model: PreTrainedModel) -> list[str]:
    """What a loaded model cannot do, in words, for results; empty for a model with a state.

    Raises:
        UserError: it cannot run on its device, or it is no causal language model.
    """
    if isinstance(model, MinRNNForCausalLM):
        return []
    try:
        measured = abilities(model)
    except Exception as error:
        where = f"{model.config.model_type} cannot run on {model.device.type}"
        raise UserError("MODEL", f"{where}: {one_line_message(error)}") from None
    if not measured.is_causal:
        raise UserError("MODEL", f"{model.config.model_type} reads the tokens that it should predict")
    return measured.limits


def require_state(model: PreTrainedModel) -> MinRNNForCausalLM:
    """The model, if it has a state of fixed size that can be carried.

    Raises:
        UserError: it has none.
    """
    if isinstance(model, MinRNNForCausalLM):
        return model
    message = f"is a {model.config.model_type} model, which carries no state over a long document"
    raise UserError("MODEL", f"{message}; minrnn, gru and lstm do (minrnn eval takes any family)")


def _read_tokenizer(name: str, folder: str, trust_remote_code: bool, needs_both: bool) -> Any:
    """The tokenizer of a model.

    Args:
        needs_both: documents stand between bos and eos, as in training; else one of them is enough.

    Raises:
        UserError: there is none, its code is not trusted, or it lacks these tokens.
    """
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if not needs_code_trust(error):
                raise
            require_code_trust(name, "tokenizer", (), trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # all from transformers
        message = f"{name} has no tokenizer; minrnn export writes one beside the weights"
        raise UserError("MODEL", message) from None
    bounds = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if len(bounds) < (2 if needs_both else 1):
        missing = "no bos or no eos" if needs_both else "neither a bos nor an eos"
        raise UserError("MODEL", f"the tokenizer of {name} has {missing} token, so no document can begin")
    return tokenizer


def _require_text(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot spell text.

    Raises:
        UserError: as said.
    """
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        message = f"the tokenizer of {name} cannot spell text (a synthetic task's vocabulary?)"
        raise UserError("MODEL", f"{message}, so none can be scored")


def _check_memory(folder: str, key: str) -> None:
    """As `_check_size`, for a model of transformers, whose layers may differ."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        check_memory(config.model_type, config)
    except UserError as error:
        raise error.with_keys(dict.fromkeys(("model.family", "model.family_config"), key)) from None


def _check_size(name: str, config: Any, build: Callable[[Any], PreTrainedModel], key: str) -> None:
    """Check that the weights fit into main memory, before allocating them.

    They are counted on the meta device, with one layer and with two: a loop over the configured number of
    layers might never end.

    Raises:
        UserError: the weights in fp32 are larger than the machine's memory.
    """
    sizes = []
    for num_layers in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers = num_layers
        try:
            with torch.device("meta"):
                sizes.append(build(small).num_parameters())
        except (RuntimeError, OverflowError):  # torch's: sizes beyond 64 bits
            raise UserError(
                key, f"{name} is larger than can be counted, by its config.json; is it of this model?"
            ) from None
    needed = 4 * (sizes[0] + (config.num_hidden_layers - 1) * (sizes[1] - sizes[0]))
    if (memory := main_memory()) is not None and needed > memory:
        message = (
            f"{name} needs {needed / 1e9:,.0f} GB for weights in fp32, by its config.json, "
            f"of {memory / 1e9:,.0f} GB here"
        )
        raise UserError(key, f"{message}; is that config.json of this model?")
