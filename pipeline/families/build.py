"""Configuration, size and model of any family, from the fields of a recipe."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...common.errors import UserError, one_line_message
from ..machine import main_memory
from .adapter import FamilyModel
from .fields import checked_config, faulty_fields, is_number
from .limits import NUM_TOKENS, abilities
from .registry import FAMILIES, OURS, canonical_name, config_of, family, size_fields
from .sizes import TOLERANCE, InvalidSizeError, NoSizeError, Size, SizeRule, find_size

NO_SPECIAL_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


PROBE_STEPS = 8  # width, in steps of the rule, of the model that is tried before sizes are searched
Build = Callable[[str, PreTrainedConfig], nn.Module]
"""The model of a family and a configuration; as `build_causal_lm`."""
SettingOf = Callable[[str | None], str]
"""The setting that a field of the configuration comes from; of None, that of all."""


class UnusableModelError(UserError):
    """A model cannot be built from its configuration, or cannot run."""


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
        message = f"{name} cannot be built: {one_line_message(error)}"
        raise UnusableModelError("model.family_config", message) from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if head is not None and getattr(config, "tie_word_embeddings", False) and not is_tied:
        raise UserError(
            "model.tie_word_embeddings", f"{name} cannot tie its head to the embedding; use false"
        )
    return model


def _runs(name: str, fields: dict[str, Any]) -> bool:
    """Whether a model of these fields can be built and read tokens, tried on tensors without memory."""
    try:
        with FakeTensorMode():  # transformers looks at values of attention masks, except in this mode
            model: Any = build_causal_lm(name, config_of(name, {**NO_SPECIAL_TOKENS, **fields})).eval()
            model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long), use_cache=False)
    except Exception:  # each configuration and model raises its own
        return False
    return True


def _faulty_fields(name: str, fields: dict[str, Any], given: dict[str, Any]) -> list[str | None]:
    # Any number of layers can be built, and the published one takes long.
    candidates = given.keys() - {canonical_name(name, "num_hidden_layers")}
    return faulty_fields(fields, sorted(candidates), lambda others: _runs(name, others))


@contextlib.contextmanager
def faults_named(
    name: str, fields: dict[str, Any], given: dict[str, Any], setting_of: SettingOf
) -> Iterator[None]:
    """Name the settings at fault in an UnusableModelError, if the model runs without any one of them.

    Args:
        fields: of the model's configuration.
        given: those that the user set.
        setting_of: the setting of a field, for the message.
    """
    try:
        yield
    except UnusableModelError as error:
        faulty = _faulty_fields(name, fields, given)
        if faulty == [None]:
            raise
        ((_, message),) = error.errors
        raise UnusableModelError.from_list((setting_of(field), message) for field in faulty) from None


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
        message = f"{name} cannot run on {device.type}: {one_line_message(error)}"
        raise UnusableModelError("model.family", message) from None
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
    build: Build = build_causal_lm,
    setting_of: SettingOf = "model.family_config.{}".format,
) -> dict[str, Any]:
    """The fields of a family's configuration that make a model of `target` parameters.

    Args:
        fields: those that the user set. They are kept.
        setting_of: as in `faults_named`.

    Raises:
        UserError: no size has so many parameters, or the model cannot be built.
    """
    known = family(name)
    assert known is not None, "checked with the recipe"
    rule = known.rule
    if name == OURS and fields.get("intermediate_size") == 0:
        rule = SizeRule(8, None, finest_step=1)  # there is no MLP

    def sized(size: Size) -> dict[str, Any]:
        return {**fields, **size_fields(name, size, fields), "vocab_size": vocab_size}

    def count(size: Size) -> int:
        try:
            return _count(name, sized(size), build)
        except UserError as error:
            if not isinstance(error, UnusableModelError):
                raise
            raise InvalidSizeError(str(error)) from error
        except Exception as error:  # each configuration raises its own
            message = f"{name} of width {size[0]} cannot be built: {one_line_message(error)}"
            raise InvalidSizeError(message) from error

    width = PROBE_STEPS * rule.step
    probe = sized((width, width if rule.fine is None else rule.fine(width)[1]))
    with faults_named(name, probe, fields, setting_of):
        _check_values(name, probe, fields, build)
        try:
            size, _ = find_size(_label(name, fields), rule, count, target)
        except NoSizeError as error:
            message = f"{error}; change it, or model.num_hidden_layers"
            raise UserError("model.num_parameters", message) from None
        except InvalidSizeError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError("model.family_config", str(error)) from None
    return size_fields(name, size, fields)


def _check_values(
    name: str,
    fields: dict[str, Any],
    given: dict[str, Any],
    build: Build,
) -> None:
    """Refuse values that fit no size, before many are tried: those at fault that are no numbers.

    Args:
        fields: of a model of some size.
        given, build: as in `faults_named` and `search_sizes`.

    Raises:
        UserError: there are, or no model of this family can be built.
    """
    try:
        _count(name, fields, build)
    except UnusableModelError:
        faulty = _faulty_fields(name, fields, given)
        if any(field is not None and not is_number(given[field]) for field in faulty):
            raise
    except UserError:
        raise
    except Exception:  # its configuration cannot have this width, but perhaps another
        return


def has_size(
    name: str,
    target: int,
    fields: dict[str, Any],
    vocab_size: int,
    build: Build = build_causal_lm,
) -> bool:
    """Whether fields of a family's configuration make a model of `target` parameters; as `search_sizes`."""
    try:
        number = _count(name, {**fields, "vocab_size": vocab_size}, build)
    except Exception:  # each configuration and model raises its own
        return False
    return abs(number - target) <= TOLERANCE * target


def _count(name: str, fields: dict[str, Any], build: Build) -> int:
    with torch.device("meta"):
        return num_parameters(build(name, config_of(name, {**fields, **NO_SPECIAL_TOKENS})))


def _label(name: str, fields: dict[str, Any]) -> str:
    num_layers = getattr(checked_config(name, fields, is_sized=True), "num_hidden_layers", None)
    return f"{name} of {num_layers} layers" if isinstance(num_layers, int) else name


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _missing(name: str, error: ImportError) -> str:
    return f"{name} needs a package: {' '.join(str(error).split())}"
