"""The cells by name: what `config.cell` may be."""

from typing import TYPE_CHECKING

from .attention import WindowAttention
from .averaging_cells import RWKV4
from .complex_cells import LRU, S4D
from .gated_cells import GILRLSTM, HGRN, QRNN, RGLRU
from .matrix_cells import GLA, HGRN2, MLSTM, LinearAttention
from .minimal_cells import GILR, MinimalMixer
from .mixer import MinRNNMixer

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig

CELLS: dict[str, type[MinRNNMixer]] = {
    "mingru": MinimalMixer,
    "minlstm": MinimalMixer,
    "mingru_signed": MinimalMixer,
    "minlstm_signed": MinimalMixer,
    "mingru_normalized": MinimalMixer,
    "minlstm_normalized": MinimalMixer,
    "gilr": GILR,
    "gilr_lstm": GILRLSTM,
    "hgrn": HGRN,
    "qrnn": QRNN,
    "rglru": RGLRU,
    "rwkv4": RWKV4,
    "lru": LRU,
    "s4d": S4D,
    "linear_attention": LinearAttention,
    "hgrn2": HGRN2,
    "mlstm": MLSTM,
    "gla": GLA,
}


def mixer_class(config: "MinRNNConfig", layer: int) -> type[MinRNNMixer]:
    """The mixer of a block, from 0: the cell, or attention in every `attention_every`-th block."""
    is_attention = config.attention_every is not None and (layer + 1) % config.attention_every == 0
    return WindowAttention if is_attention else CELLS[config.cell]


def mixer_classes(config: "MinRNNConfig") -> list[type[MinRNNMixer]]:
    """Those of all blocks."""
    return [mixer_class(config, layer) for layer in range(config.num_hidden_layers)]
