"""The mixer of a bidirectional block that reads each row from right to left.

    block:  x + mixer(norm(x)) + reverse(mixer_2(reverse(norm(x)))),   then   x + mlp(norm(x))

Each direction has its own mixer, and their outputs are added. As each ends with a projection of its own, this
is the same as one projection of both states concatenated, the usual form of bidirectional state-space models
(S5: Smith et al., arXiv 2208.04933; S4 adds the two kernels' outputs). A model that read both ways has no
state to carry: the right end of a row must be known.
"""

from torch import Tensor, nn

from .boundaries import Boundaries
from .mixer import MinRNNMixer


class ReverseMixer(nn.Module):
    """A mixer that reads each row's real tokens in reverse order.

    Args:
        mixer: the mixer.
    """

    def __init__(self, mixer: MinRNNMixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, boundaries: Boundaries, lower_bound: Tensor | None = None) -> Tensor:
        """x [B, T, H] -> [B, T, H]; real tokens on the left of each row."""
        order, boundaries = boundaries.to(x.device).reversed(x.shape[1], self.mixer.kernel)
        if order is None:
            return self.mixer(x.flip(1), (None, None), boundaries, lower_bound)[0].flip(1)
        index = order.unsqueeze(-1).expand_as(x)
        return self.mixer(x.gather(1, index), (None, None), boundaries, lower_bound)[0].gather(1, index)
