"""Pretrain minimal recurrent language models (minGRU, minLSTM) with the Hugging Face stack.

The names below are imported at their first use, so that data workers load neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minrnn.models import MinRNNConfig, MinRNNForCausalLM, linear_scan
    from minrnn.pipeline.loop import train
    from minrnn.pipeline.recipe import read_recipe

__version__ = "0.1.0"
__all__ = ["MinRNNConfig", "MinRNNForCausalLM", "__version__", "linear_scan", "read_recipe", "train"]

_MODULES = {
    "MinRNNConfig": "minrnn.models",
    "MinRNNForCausalLM": "minrnn.models",
    "linear_scan": "minrnn.models",
    "read_recipe": "minrnn.pipeline.recipe",
    "train": "minrnn.pipeline.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
