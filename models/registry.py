"""The cells by name: what `config.cell` may be."""

from .averaging_cells import RWKV4
from .complex_cells import LRU, S4D
from .gated_cells import GILRLSTM, HGRN, QRNN, RGLRU
from .matrix_cells import GLA, HGRN2, MLSTM, LinearAttention
from .minimal_cells import GILR, MinimalMixer
from .mixer import MinRNNMixer

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
