"""Triton is tried out before anything depends on it, and what does not work is a reason, not a crash."""

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from minrnn.models import probe_triton
from minrnn.models.probe_triton import triton_problem

pytestmark = pytest.mark.skipif(probe_triton.triton is None, reason="needs the package triton")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def probed(monkeypatch) -> Iterator[list[Tensor]]:
    """The arguments of each call of the probe, on the CPU in place of a GPU."""
    tensors: list[Tensor] = []
    probe_triton._failure.cache_clear()
    monkeypatch.setattr(probe_triton, "run_probe", tensors.append)
    yield tensors
    probe_triton._failure.cache_clear()


def test_once_for_each_device_and_number_format(probed):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert probe_triton._failure(CPU, dtype) is None
    assert [tensor.dtype for tensor in probed] == [torch.float32, torch.bfloat16]


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC."), "Failed to find C compiler"),
        (PermissionError(13, "Permission denied", "/.triton"), "PermissionError: .*Permission denied"),
        (ArithmeticError("a kernel's result is wrong"), "a kernel's result is wrong"),
        (AssertionError(), "AssertionError: "),
        (ValueError("type bf16 is not supported\n  on this GPU\n"), "type bf16 is not supported$"),
    ],
)
def test_a_failure_becomes_a_reason_in_one_line(error, reason, probed, monkeypatch):
    monkeypatch.setattr(probe_triton, "run_probe", raising(error))
    failure = probe_triton._failure(CPU, torch.bfloat16)
    assert failure is not None
    assert re.search(reason, failure)
    assert "\n" not in failure


def test_out_of_memory_is_raised(probed, monkeypatch):
    """No kernel is to blame, and another backend would need more memory still."""
    monkeypatch.setattr(torch, "zeros", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        probe_triton._failure(CPU, torch.float32)


def test_modes_of_the_caller_do_not_reach_the_probe(probed):
    """Real tensors, not the ones that a tracer computes shapes with."""
    threads = set(threading.enumerate())
    with FakeTensorMode(), torch.inference_mode():
        assert probe_triton._failure(CPU, torch.float32) is None
    assert not is_fake(probed[0])
    assert not probed[0].is_inference()
    assert set(threading.enumerate()) <= threads, "the probe's own thread has ended"


def test_devices_and_builds_that_need_no_probe(probed, monkeypatch):
    assert "the tensors are on cpu" in str(triton_problem(CPU, torch.float32))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "only NVIDIA GPUs know" in str(triton_problem(GPU, torch.float32))
    monkeypatch.setattr(probe_triton, "triton", None)
    assert "triton is missing" in str(triton_problem(GPU, torch.float32))
    assert not probed
