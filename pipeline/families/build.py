"""Configuration, size and model of any family, from the fields of a recipe."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...common.errors import UserError, one_line_message
from ..machine import main_memory
from .adapter import FamilyModel
from .fields import checked_config
from .limits import abilities
from .registry import FAMILIES, OURS, config_of, family, size_fields
from .sizes import TOLERANCE, InvalidSizeError, NoSizeError, Size, SizeRule, find_size


def causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    """A language model with new weights, on the current default device."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportAttributeAccessIssue]
    return model_class(config)


def build_causal_lm(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A language model of a family, with new weights.

    Raises:
        UserError: it cannot be built: a package is missing, or values of the configuration do not fit.
    """
    try:
        model = causal_lm(config)
    except ImportError as error:
        raise UserError("model.family", _missing(name, error)) from None
    except Exception as error:  # each model raises its own
        raise UserError("model.family_config", f"{name} cannot be built: {one_line_message(error)}") from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if head is not None and getattr(config, "tie_word_embeddings", False) and not is_tied:
        raise UserError(
            "model.tie_word_embeddings", f"{name} cannot tie its head to the embedding; use false"
        )
    return model


def check_memory(name: str, config: PreTrainedConfig) -> None:
    """Refuse weights that are larger than the machine's memory, before they are allocated.

    A family of transformers has the size of its published model where nothing is set.

    Raises:
        UserError: they are, or the model cannot be built.
    """
    with torch.device("meta"):
        number = num_parameters(build_causal_lm(name, config))
    if (memory := main_memory()) is not None and 4 * number > memory:
        size = f"{4 * number / 1e9:,.0f} GB in fp32, of {memory / 1e9:,.0f} GB here"
        raise UserError("model.family", f"this {name} has {number:,} parameters, {size}; set its sizes")


def training_config(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with what is for training only."""
    config = copy.deepcopy(config)
    for field, value in FAMILIES[name].training_fields().items() if name in FAMILIES else ():
        setattr(config, field, value)
    return config


def adapt(name: str, model: PreTrainedModel, device: torch.device) -> FamilyModel:
    """Move a model to its device, measure what it can do there, and wrap it for training.

    Raises:
        UserError: it cannot run there, or it is not causal.
    """
    nn.Module.to(model, device)
    try:
        measured = abilities(model)
    except Exception as error:
        raise UserError(
            "model.family", f"{name} cannot run on {device.type}: {one_line_message(error)}"
        ) from None
    if not measured.is_causal:
        message = f"{name} reads the tokens that it should predict"
        hint = "; set family_config {is_decoder: true}" if hasattr(model.config, "is_decoder") else ""
        raise UserError("model.family", message + hint)
    return FamilyModel(model, measured)


def search_sizes(
    name: str,
    target: int,
    fields: dict[str, Any],
    vocab_size: int,
    build: Callable[[PreTrainedConfig], nn.Module] = causal_lm,
) -> dict[str, Any]:
    """The fields of a family's configuration that make a model of `target` parameters.

    Args:
        fields: those that the user set. They are kept.
        build: the model of a configuration.

    Raises:
        UserError: no size has so many parameters, or the model cannot be built.
    """
    known = family(name)
    assert known is not None, "checked with the recipe"
    rule = known.rule
    if name == OURS and fields.get("intermediate_size") == 0:
        rule = SizeRule(8, None, finest_step=1)  # there is no MLP

    def count(size: Size) -> int:
        try:
            return _count(name, {**fields, **size_fields(name, size, fields)}, vocab_size, build)
        except ImportError:
            raise
        except Exception as error:  # each configuration and model raises its own
            raise InvalidSizeError(
                f"of width {size[0]} cannot be built: {one_line_message(error)}"
            ) from error

    try:
        size, _ = find_size(_label(name, fields), rule, count, target)
    except ImportError as error:
        raise UserError("model.family", _missing(name, error)) from None
    except NoSizeError as error:
        raise UserError("model.num_parameters", f"{error}; change it, or model.num_hidden_layers") from None
    except InvalidSizeError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError("model.family_config", f"{name} {error}") from None
    return size_fields(name, size, fields)


def has_size(
    name: str,
    target: int,
    fields: dict[str, Any],
    vocab_size: int,
    build: Callable[[PreTrainedConfig], nn.Module] = causal_lm,
) -> bool:
    """Whether fields of a family's configuration make a model of `target` parameters; as `search_sizes`."""
    try:
        number = _count(name, fields, vocab_size, build)
    except Exception:  # each configuration and model raises its own
        return False
    return abs(number - target) <= TOLERANCE * target


def _count(
    name: str, fields: dict[str, Any], vocab_size: int, build: Callable[[PreTrainedConfig], nn.Module]
) -> int:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with torch.device("meta"):
        return num_parameters(build(config_of(name, {**fields, **special, "vocab_size": vocab_size})))


def _label(name: str, fields: dict[str, Any]) -> str:
    num_layers = getattr(checked_config(name, fields, is_sized=True), "num_hidden_layers", None)
    return f"{name} of {num_layers} layers" if isinstance(num_layers, int) else name


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _missing(name: str, error: ImportError) -> str:
    return f"{name} needs a package: {' '.join(str(error).split())}"
