"""The model that a run trains: with a checkpoint's weights, an export's, or new ones."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..common.errors import UserError
from ..common.output import warn
from ..models import MinRNNForCausalLM, MinRNNForSequenceClassification
from ..models.dtypes import DTYPES
from ..models.recompute import checkpointing_options
from . import checkpoint
from .classification import new_model
from .config import Recipe
from .families.adapter import FamilyModel
from .families.build import adapt, check_memory, faults_named, training_config
from .families.registry import CARRYING, OURS
from .families.saved import check_defaults
from .folder import RunFolder
from .loading import read_weights
from .machine import compile_error

TrainedModel = MinRNNForCausalLM | MinRNNForSequenceClassification | FamilyModel
"""What the loop trains; `TorchRNNForCausalLM` is a `MinRNNForCausalLM`."""

COMPARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "cell",
    "expansion_factor",
    "output_gate",
    "conv_kernel",
    "intermediate_size",
    "gated_mlp",
    "candidate_activation",
    "hidden_act",
    "rms_norm_eps",
    "head_dim",
    "state_expansion",
    "ternary",
    "bidirectional",
    "output_norm",
    "residual_scales",
    "logit_softcap",
    "two_tap_input",
    "attention_every",
    "attention_window",
)


def build_model(
    recipe: Recipe, config: PreTrainedConfig, folder: RunFolder, device: torch.device
) -> TrainedModel:
    """Build the model: on the CPU, or on `device` for a family of transformers, which is measured there.

    Args:
        device: where the model will be trained; torch.compile must support it.

    Raises:
        UserError: the checkpoint or the export of `model.init_from` holds another model, or cannot be read;
            or the family's model cannot be built or run here.
    """
    torch.manual_seed(recipe.run.seed)
    name = recipe.model.family
    fields = {**recipe.resolved_model_fields(), "vocab_size": config.vocab_size}
    with faults_named(name, fields, recipe.given_model_fields(), recipe.model.setting_of):
        if name != OURS:
            check_memory(name, config)
        inner: Any = new_model(name, training_config(name, config))
        nn.Module.to(inner, DTYPES["fp64" if recipe.train.precision == "fp64" else "fp32"])
        # New weights are measured, so that a resumed run measures the same.
        model: Any = inner if name in CARRYING else adapt(name, inner, device)
    if recipe.model.init_from and folder.checkpoint is None:
        _load_export(inner, recipe.model.init_from)
    if (options := checkpointing_options(recipe.train.recompute)) is not None:
        model.activation_checkpointing_enable(options)
    if recipe.train.compile:
        _compile_blocks(model, device)
    if folder.checkpoint is not None:
        check_defaults(name, folder.checkpoint, config)
        try:
            checkpoint.load_parameters(folder.checkpoint, model)
        except ValueError as error:
            raise UserError("run.dir", str(error)) from None
    return model


def _compile_blocks(model: Any, device: torch.device) -> None:
    if (reason := compile_error(device)) is not None:
        warn(
            f"train.compile: torch.compile cannot run on {device.type}: {reason}; "
            "blocks run as they are, slower"
        )
        return
    for block in model.model.layers:
        block.compile()


def _load_export(model: Any, name: str) -> None:
    """Copy the weights of an export of the same shape; a classifier takes those below a language model's
    head."""
    unset_hf_deepspeed_config()  # under ZeRO-3, from_pretrained would load only this process's shard
    source = read_weights(name, key="model.init_from")
    exported, own = source.config.to_dict(), model.config.to_dict()
    if exported["model_type"] != own["model_type"]:
        message = f"{name} is a {exported['model_type']} model, not {own['model_type']}; set model.family"
        raise UserError("model.init_from", message)
    different = [field for field in COMPARED_FIELDS if exported.get(field) != own.get(field)]
    if isinstance(model, MinRNNForSequenceClassification) and "logit_softcap" in different:
        different.remove("logit_softcap")  # of the head, which it does not take
    if exported.get("learn_h0") and not own.get("learn_h0"):
        different.append("learn_h0")
    if own["model_type"] != "minrnn":
        shapes = {name: parameter.shape for name, parameter in source.named_parameters()}
        if shapes != {name: parameter.shape for name, parameter in model.named_parameters()}:
            different = different or ["family_config"]
    if different:
        raise UserError.from_list(
            (
                f"model.{field}",
                f"is {own.get(field)!r}, but {name} (model.init_from) has {exported.get(field)!r}",
            )
            for field in different
        )
    if isinstance(model, MinRNNForSequenceClassification):
        model, source = model.model, cast(MinRNNForCausalLM, source).model
    # An export without learnt initial states begins documents from 0, as new parameters do.
    new = {key: tensor for key, tensor in model.state_dict().items() if key.endswith(".mixer.h0")}
    model.load_state_dict({**new, **source.state_dict()})
