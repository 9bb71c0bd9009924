"""The Triton kernels compile without spills for two architectures. Needs no GPU.

`minrnn figures kernels` prints the whole table.
"""

import pytest
import torch

from minrnn.evals.figures import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="needs the package triton")
BF16 = torch.bfloat16

LAUNCHES = dict(
    [
        *kernels.general_launches(BF16, 1),
        *kernels.cell_launches("mingru", "none", True, BF16, 1),
        *kernels.cell_launches("minlstm", "none", False, BF16, kernels.NUM_CHUNKS),
        *kernels.cell_launches("mingru", "none", True, BF16, 1, boundaries=True),
    ]
)


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_burst_and_no_spills(name):
    """Two programs fit on a multiprocessor, and the loop is not bound by its arithmetic."""
    row = kernels.describe(name, LAUNCHES[name], 90)
    assert row["spills"] == 0
    assert 2 * 32 * row["warps"] * row["registers"] <= 2**16
    if "issue" in row:
        assert max(row["issue"], row["special"]) < 0.9
        assert not any(kind.startswith(("LDL", "STL", "BRA.DIV", "CALL")) for kind in row["loop"])


@pytest.mark.parametrize("name", list(LAUNCHES)[:1])
def test_an_older_architecture(name):
    assert kernels.compile_launch(LAUNCHES[name], 80)["spills"] == 0


def test_instructions_are_counted():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 FFMA R3, R2, R2, R3 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
    .L_x_0:
        /*0040*/                   EXIT ;
        /*0050*/                   BRA `(.L_x_0);
    """
    assert [len(loop) for loop in kernels.loops(listing)] == [3, 2, 0]
