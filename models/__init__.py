"""The models. Importing this package registers `minrnn` and `torch_rnn` with transformers' Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .backprop import backprop_through_chunks
from .cache import MinRNNCache
from .configuration_minrnn import MinRNNConfig
from .configuration_torch_rnn import TorchRNNConfig
from .modeling_classification import MinRNNForSequenceClassification
from .modeling_minrnn import MinRNNForCausalLM, MinRNNModel
from .modeling_torch_rnn import TorchRNNForCausalLM, TorchRNNModel
from .scan import linear_scan


def _register(config: Any, model: Any, causal_lm: Any) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    causal_lm.register_for_auto_class("AutoModelForCausalLM")


_register(MinRNNConfig, MinRNNModel, MinRNNForCausalLM)
_register(TorchRNNConfig, TorchRNNModel, TorchRNNForCausalLM)
AutoModelForSequenceClassification.register(MinRNNConfig, MinRNNForSequenceClassification, exist_ok=True)
MinRNNForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "MinRNNCache",
    "MinRNNConfig",
    "MinRNNForCausalLM",
    "MinRNNForSequenceClassification",
    "MinRNNModel",
    "TorchRNNConfig",
    "TorchRNNForCausalLM",
    "TorchRNNModel",
    "backprop_through_chunks",
    "linear_scan",
]
