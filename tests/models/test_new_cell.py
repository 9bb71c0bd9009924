"""docs/new-cell.md as a reader follows it: the code on the page is a cell that keeps every promise."""

import re
import sys
from pathlib import Path
from types import ModuleType

import naive_cells
import pytest
import torch
from helpers import assert_close, chunked_logits, gradients, logits_of, new_model, random_ids

from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.mixer import MinRNNMixer
from minrnn.models.registry import CELLS

PAGE = Path(__file__).parents[2] / "docs" / "new-cell.md"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's code, with its cell registered as `ema`."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = ModuleType("minrnn.models.ema_cell")
    module.__package__ = "minrnn.models"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code[0], "models/ema_cell.py", "exec"), vars(module))
    monkeypatch.setitem(CELLS, "ema", module.EMA)
    return code


def test_the_page_adds_a_cell_in_less_than_40_lines(blocks):
    assert len([line for line in blocks[0].splitlines() if line.strip()]) < 40


def test_the_cell_is_its_naive_twin(blocks):
    exec(compile(blocks[1], "naive_cells.py", "exec"), namespace := dict(vars(naive_cells)))
    mixer = new_model(dtype=torch.float64, cell="ema").model.layers[0].get_submodule("mixer")
    assert isinstance(mixer, MinRNNMixer)
    assert mixer.gate is not None
    projected = torch.randn(2, 9, sum(mixer.widths), dtype=torch.float64)
    *parts, gate = projected.split(mixer.widths, -1)
    h, last = namespace["ema"](mixer, tuple(parts), None)
    y, actual = mixer.recur(projected, None, NO_BOUNDARIES)
    assert_close(y, h * torch.nn.functional.silu(gate), atol=1e-12)
    assert_close(actual, last, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_the_cell_can_be_cut_anywhere():
    model, ids = new_model(dtype=torch.float64, cell="ema"), random_ids(2, 24)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, 9] = True
    whole = logits_of(model, ids, document_starts=starts)
    for cuts in ([5], [9, 10], list(range(1, 24))):
        assert_close(chunked_logits(model, ids, cuts, document_starts=starts)[0], whole, atol=1e-12)
    assert_close(whole[:1, 9:], logits_of(model, ids[:1, 9:]), atol=1e-12)
    loss = model(ids, labels=ids).loss
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, loss).values())
