"""One model for all lengths and masks under torch.compile, torch.export, fake tensors and on the meta device.

And derivatives that our operators do not have are errors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, logits_of, new_model, random_ids, shared_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from minrnn.models import MinRNNCache
from minrnn.models.cell_scan import cell_scan
from minrnn.models.cell_spec import CellSpec
from minrnn.models.conv import causal_conv
from minrnn.models.layers import RMSNorm, swiglu
from minrnn.models.loss import linear_cross_entropy
from minrnn.models.scan import linear_scan

BATCH = 2


def padded(time: int) -> tuple[Tensor, Tensor]:
    """Ids [batch, time], and a mask that hides the beginning of the first row."""
    ids, mask = random_ids(BATCH, time), torch.ones(BATCH, time, dtype=torch.long)
    mask[0, : time // 2] = 0
    return ids, mask


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_one_compilation_serves_every_length(backend, fresh_dynamo):
    """Two compilations: the first length is static, the second dynamic. Some masks have no padding."""
    model, counter = (
        new_model(scan_backend=backend, num_hidden_layers=1),
        CompileCounterWithBackend("aot_eager"),
    )
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for time in (2, 3, *range(5, 15)):
        ids, mask = padded(time)
        mask = mask if time % 2 else torch.ones_like(mask)
        with torch.no_grad():
            actual, expected = (
                f(ids, attention_mask=mask, use_cache=False).logits for f in (compiled, model)
            )
        assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, name=f"length {time}")
    assert counter.frame_count == 2


@pytest.mark.parametrize("skip_logits", [False, True])
def test_one_compilation_trains_every_length(skip_logits, fresh_dynamo):
    model, counter = new_model(num_hidden_layers=1).train(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for time in (3, *range(5, 15)):
        ids, mask = padded(time)
        options = {"attention_mask": mask, "labels": ids, "use_cache": False, "skip_logits": skip_logits}
        losses = [function(ids, **options).loss for function in (compiled, model)]
        results = [[loss, *torch.autograd.grad(loss, list(model.parameters()))] for loss in losses]
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, atol=1e-5, name=f"length {time}")
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("cell", "strict"),
    [
        ("mingru", False),
        ("mingru", True),
        ("rwkv4", False),
        pytest.param("lru", False, marks=pytest.mark.slow),
        pytest.param("gla", False, marks=pytest.mark.slow),
    ],
)
def test_an_exported_program_reads_any_length(cell, strict):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = new_model(cell=cell)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    module, time = Logits().eval(), torch.export.Dim("time", min=2, max=4096)
    shapes = {1: time}, {1: time}
    program = torch.export.export(module, padded(7), dynamic_shapes=shapes, strict=strict).module()
    for length in (7, 4, 30):
        ids, mask = padded(length)
        assert_close(program(ids, mask)[mask.bool()], module(ids, mask)[mask.bool()], atol=1e-5)


class Step(torch.nn.Module):
    """One pass that takes and returns the state as tensors: recurrent state and convolution of each layer."""

    def __init__(self):
        super().__init__()
        self.model = new_model()

    def forward(self, ids: Tensor, *states: Tensor) -> tuple[Any, ...]:
        cache = MinRNNCache(self.model.config.num_hidden_layers)
        for i, layer in enumerate(cache.layers):
            layer.replace(states[2 * i], states[2 * i + 1], num_tokens=1)
        logits = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.recurrent, layer.conv))


@pytest.mark.parametrize("time", [1, 5])
def test_an_exported_step_reads_and_returns_the_state(time):
    """Decoding (one token) and a prompt in pieces (five), from the program's own states."""
    step, ids = Step().eval(), random_ids(BATCH, 4 * time)
    config = step.model.config
    shapes = (BATCH, config.recurrent_size), (BATCH, config.conv_kernel - 1, config.hidden_size)
    states = [
        torch.zeros(shape) for _ in range(config.num_hidden_layers) for shape in shapes
    ]  # export takes one tensor twice for one input
    with torch.no_grad():
        program, pieces = torch.export.export(step, (ids[:, :time], *states)).module(), []
        for piece in ids.split(time, dim=1):
            logits, *states = program(piece, *states)
            pieces.append(logits)
        assert_close(torch.cat(pieces, dim=1), step.model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_are_known_without_values(where):
    if where == "meta":
        model, (ids, mask) = new_model(), (tensor.to("meta") for tensor in padded(9))
        torch.nn.Module.to(model, "meta")
        output = model(ids, attention_mask=mask, labels=ids)
    else:
        model = shared_model()
        with FakeTensorMode(allow_non_fake_inputs=True):
            ids, mask = (torch.ones(BATCH, 9, dtype=torch.long) for _ in range(2))
            output = model(ids, attention_mask=mask, labels=ids)
    assert output.logits.shape[:2] == (BATCH, 9)
    assert output.loss.shape == ()


def test_a_mask_without_padding_changes_nothing():
    ids, model = random_ids(BATCH, 8), shared_model()
    assert torch.equal(logits_of(model, ids, attention_mask=torch.ones_like(ids)), logits_of(model, ids))


X = torch.linspace(-1, 1, 60).view(2, 5, 6)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": RMSNorm(6, 1e-6).requires_grad_(False),
    "swiglu": swiglu,
    "convolution": lambda x: causal_conv(x, torch.ones(6, 4)),
    "cell": lambda x: cell_scan(x, torch.zeros(1, 3), spec=CellSpec("mingru"))[0],
    "composed cell": lambda x: cell_scan(x, torch.zeros(1, 3), spec=CellSpec("mingru_signed"))[0],
    "loss": lambda x: linear_cross_entropy(x, torch.ones(9, 6), torch.ones(2, 5, dtype=torch.long)),
    "reference scan": lambda x: linear_scan(x.sigmoid(), x, backend="reference")[0],
    "torch scan": lambda x: linear_scan(x.sigmoid(), x, backend="torch")[0],
    "numba scan": lambda x: linear_scan(x.sigmoid(), x, backend="numba")[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_an_error(name):
    """Not a derivative of 0."""
    function = FUNCTIONS[name]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
        torch.func.jvp(function, (X,), (torch.ones_like(X),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"forward-mode|jvp"):
        function(forward_ad.make_dual(X, torch.ones_like(X)))
    assert torch.isfinite(function(X)).all()


def test_forward_mode_is_an_error_in_a_compiled_function(fresh_dynamo):
    compiled = torch.compile(lambda x: torch.func.jvp(FUNCTIONS["norm"], (x,), (x,))[1], backend="eager")
    with pytest.raises(Exception, match="forward-mode"):
        compiled(X)
