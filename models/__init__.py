"""The models. Importing this package registers the model type `minrnn` with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import MinRNNCache
from .configuration_minrnn import MinRNNConfig
from .modeling_minrnn import MinRNNForCausalLM, MinRNNModel
from .scan import linear_scan

AutoConfig.register("minrnn", MinRNNConfig, exist_ok=True)
AutoModel.register(MinRNNConfig, MinRNNModel, exist_ok=True)
AutoModelForCausalLM.register(MinRNNConfig, MinRNNForCausalLM, exist_ok=True)
MinRNNConfig.register_for_auto_class()
MinRNNModel.register_for_auto_class("AutoModel")
MinRNNForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MinRNNCache", "MinRNNConfig", "MinRNNForCausalLM", "MinRNNModel", "linear_scan"]
