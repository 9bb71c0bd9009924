"""Models on another device than the current one, or on several devices.

Graphs, launches and boundaries follow the tensors. These tests need no second device. A mock of torch.cuda
records the device of each call, and the meta device replaces the second device: a tensor that is not moved is
an error too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import new_model, random_ids
from torch import Tensor

from minrnn.models import MinRNNCache
from minrnn.models.boundaries import Boundaries
from minrnn.models.decoding import TokenStep, prefill
from minrnn.models.launches_triton import Launch
from minrnn.models.loss import next_token_loss

SECOND = torch.device("cuda:1")


class OnSecondGPU(torch.Tensor):
    """A CPU tensor whose device is a GPU."""

    @classmethod
    def __torch_function__(cls, *arguments: Any, **options: Any) -> Any:
        """Results are ordinary tensors."""
        return torch._C._disabled_torch_function_impl(*arguments, **options)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SECOND


class MockCuda:
    """torch.cuda's streams and graphs, and the device that is current when they are made or used."""

    def __init__(self, log: list[tuple[str, torch.device]], current: list[torch.device]):
        self.log, self.current = log, current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.current.append(device)
        yield
        self.current.pop()

    def record(self, call: str) -> None:
        self.log.append((call, self.current[-1]))

    def Stream(self) -> Any:
        self.record("stream")
        return MockCuda(self.log, self.current)

    def CUDAGraph(self) -> Any:
        self.record("graph")
        return MockCuda(self.log, self.current)

    def current_stream(self) -> Any:
        self.record("current stream")
        return MockCuda(self.log, self.current)

    def wait_stream(self, other: Any) -> None:
        self.record("wait")

    def replay(self) -> None:
        self.record("replay")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        assert isinstance(stream, MockCuda)
        self.record("on a stream")
        yield

    @contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        assert isinstance(stream, MockCuda), "torch's own capture stream is on the device of the first graph"
        self.record("capture")
        yield


@pytest.fixture
def cuda(monkeypatch) -> MockCuda:
    stand_in = MockCuda([], [torch.device("cuda:0")])
    for name in ("device", "Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_a_graph_is_recorded_and_replayed_on_the_model_s_device(cuda):
    model, ids = new_model(), random_ids(2, 6)
    step = TokenStep(model, prefill(model, ids)[1], graph=False)
    before = step.cache.state_dict()
    step.tokens = torch.Tensor._make_subclass(OnSecondGPU, step.tokens)
    step._capture()
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.cache.state_dict().items())
    step(ids[:, 0])
    assert {call for call, _ in cuda.log} >= {"stream", "graph", "capture", "replay"}
    assert {device for _, device in cuda.log} == {SECOND}
    assert cuda.current == [torch.device("cuda:0")]


def test_a_kernel_is_launched_on_its_tensors_device(cuda):
    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda **arguments: cuda.record("launch")

    x = torch.Tensor._make_subclass(OnSecondGPU, torch.ones(1))
    Launch(Kernel(), 1, 1, {"number": 3, "x": x}, {}).run()
    assert cuda.log == [("launch", SECOND)]


def test_a_model_on_several_devices_has_no_graph():
    model = new_model()
    _, cache = prefill(model, random_ids(1, 3))
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="on one GPU, but this one is on cpu, meta: use graph=False"):
        TokenStep(model, cache, graph=True)
    assert TokenStep(model, cache).graph is None


def test_boundaries_are_moved_as_one():
    starts = torch.zeros(2, 5, dtype=torch.bool)
    where = Boundaries.of(starts, torch.tensor([5, 3]), 4)
    moved = where.to("meta")
    tensors = moved.document_starts, moved.lengths, moved.reach
    assert [tensor is not None and tensor.is_meta for tensor in tensors] == [True] * 3
    assert where.to("cpu").reach is where.reach
    assert Boundaries(None, None, None).to("meta") == Boundaries(None, None, None)


@pytest.mark.parametrize("fields", [{}, {"cell": "minlstm_signed", "conv_kernel": 0}])
def test_a_batch_with_boundaries_passes_from_device_to_device(fields):
    """As with `device_map`: second block, norm and head on another device, with accelerate's hooks."""
    model, ids = new_model(num_hidden_layers=2, **fields), random_ids(2, 7)
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        hook = AlignDevicesHook(execution_device="meta", place_submodules=False)
        add_hook_to_module(module.to("meta"), hook)
    mask, starts = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :3], starts[:, 4] = 0, True
    cache = MinRNNCache(2)
    options = {"attention_mask": mask, "document_starts": starts, "labels": ids}
    for _ in range(2):
        output = model(ids, **options, past_key_values=cache, use_cache=True)
        assert output.logits.shape == (2, 7, model.config.vocab_size)
        assert output.logits.device.type == output.loss.device.type == "meta"
    states = [layer.recurrent for layer in cache.layers]
    assert [state is not None and state.device.type for state in states] == ["cpu", "meta"]


def test_num_items_is_moved_to_the_device_of_the_loss():
    logits: Tensor = torch.zeros(2, 3, 5, device="meta")
    assert next_token_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.tensor(6)).device.type == "meta"
