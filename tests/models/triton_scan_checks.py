"""The Triton kernels of the scan, and the probe, against a plain loop, on a GPU or in Triton's interpreter.

`test_triton` runs this file.
"""

import itertools

import pytest
import torch
from helpers import assert_close
from triton_helpers import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    TILE,
    Problem,
    Results,
    assert_results,
    ignores_overflow,
    random,
    to_device,
)

from minrnn.models import scan_triton
from minrnn.models.launches_triton import Tile, plan_chunks, run_all
from minrnn.models.probe_triton import SIZE, run_probe

DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, FP32),
    "fp32-bf16": (FP32, BF16, FP32),
    "fp32-fp16": (FP32, FP16, FP32),
    "fp64-bf16": (FP64, BF16, FP32),
    "fp32-fp64": (FP32, FP64, FP64),
}


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16])
def test_the_probe_passes(dtype):
    run_probe(torch.zeros(SIZE, dtype=dtype, device=DEVICE))


def random_scan_inputs(seed: int, batch: int, time: int, width: int, dtypes=DTYPES["fp32"]) -> Problem:
    """(a, b, h0, grad_h, grad_last), with a in [-1, 1] and some zeros and ones among it."""
    a = random(seed, batch, time, width).clamp(-1, 1)
    a = torch.where(random(seed + 1, batch, time, width) > 1.5, 0.0, a)
    h0, grad_last = random(seed + 2, batch, width), random(seed + 3, batch, width)
    b, grad_h = random(seed + 4, batch, time, width), random(seed + 5, batch, time, width)
    return a.to(dtypes[0]), b.to(dtypes[1]), h0.to(dtypes[2]), grad_h.to(dtypes[1]), grad_last.to(dtypes[2])


def scan(problem: Problem, num_chunks: int | None = 1, tile: Tile | None = TILE) -> Results:
    a, b, h0, grad_h, grad_last = to_device(problem)
    (h, h_last, decay), launches = scan_triton.forward_launches(a, b, h0, True, tile, num_chunks)
    run_all(launches)
    (da, db, dh0), launches = scan_triton.backward_launches(a, h, h0, grad_h, grad_last, tile, num_chunks)
    run_all(launches)
    return {"h": h, "h_last": h_last, "decay": decay, "da": da, "db": db, "dh0": dh0}


def plain_scan(problem: Problem) -> Results:
    """In fp64, differentiated by autograd."""
    a, b, h0 = (x.double().requires_grad_() for x in problem[:3])
    grad_h, grad_last = (x.double() for x in problem[3:])
    state, states = h0, []
    for t in range(a.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    h = torch.stack(states, 1) if states else torch.zeros_like(b)
    loss = (h * grad_h).sum() + (state * grad_last).sum() + 0 * (a.sum() + b.sum())
    da, db, dh0 = torch.autograd.grad(loss, (a, b, h0))
    return {
        "h": h.detach(),
        "h_last": state.detach(),
        "decay": a.detach().prod(1),
        "da": da,
        "db": db,
        "dh0": dh0,
    }


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_scan(dtypes, num_chunks):
    problem = random_scan_inputs(0, 2, 11, 5, dtypes)
    actual = scan(problem, num_chunks)
    state = FP64 if FP64 in dtypes[:2] else FP32
    expected_dtypes = {
        "h": dtypes[1],
        "h_last": state,
        "decay": state,
        "da": dtypes[0],
        "db": dtypes[1],
        "dh0": state,
    }
    assert {name: value.dtype for name, value in actual.items()} == expected_dtypes
    assert_results(actual, plain_scan(problem), dtypes[1])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (1, 1, 1), (1, 4, 4), (2, 3, 0), (1, 9, 1)], ids=str)
def test_scan_shapes(shape):
    problem = random_scan_inputs(1, *shape)
    for num_chunks in (1, 2):
        assert_results(scan(problem, num_chunks), plain_scan(problem))


def test_scan_of_views():
    """Tokens, rows and channels in any order in memory, repeated, or with gaps."""
    a, b, h0, grad_h, grad_last = random_scan_inputs(2, 2, 6, 5)
    a = torch.cat([a, a], -1)[:, :, 2:7]
    b = b.transpose(0, 1).contiguous().transpose(0, 1)
    h0 = h0.t().contiguous().t()
    grad_h = grad_h[:1, :1].expand(2, 6, 5)
    assert_results(scan((a, b, h0, grad_h, grad_last)), plain_scan((a, b, h0, grad_h, grad_last)))
    a = a.transpose(1, 2).contiguous().transpose(1, 2)
    assert_results(scan((a, b, h0, grad_h, grad_last)), plain_scan((a, b, h0, grad_h, grad_last)))


def test_scan_with_its_own_tiles():
    """As a call would launch it: channel blocks of 64, lanes of 8 and more tokens."""
    problem = random_scan_inputs(3, 1, 133, 40)
    assert_results(scan(problem, None, None), plain_scan(problem))


def test_scan_one_token():
    problem = random_scan_inputs(4, 2, 1, 66)
    assert_results(scan(problem, None, None), plain_scan(problem))


def test_scan_cut_in_two():
    a, b, h0, _, _ = random_scan_inputs(5, 2, 13, 3)
    whole, decay = [scan(random_scan_inputs(5, 2, 13, 3))[name] for name in ("h_last", "decay")]
    zeros = torch.zeros_like(b), torch.zeros_like(h0)
    early = scan((a[:, :6], b[:, :6], h0, zeros[0][:, :6], zeros[1]))
    late = scan((a[:, 6:], b[:, 6:], early["h_last"].cpu(), zeros[0][:, 6:], zeros[1]))
    assert_close(late["h_last"], whole, atol=1e-6)
    assert_close(early["decay"] * late["decay"], decay, atol=1e-6)


def test_scan_is_deterministic():
    problem = random_scan_inputs(6, 1, 9, 5)
    once, again = scan(problem, 3), scan(problem, 3)
    assert all(torch.equal(once[name], again[name]) for name in once)


@ignores_overflow
@pytest.mark.parametrize(("poison", "num_chunks"), [(float("nan"), 3), (float("inf"), 1)])
def test_scan_keeps_poison_in_its_channel(poison, num_chunks):
    a, b, h0, grad_h, grad_last = random_scan_inputs(7, 2, 11, 5)
    clean = scan((a, b, h0, grad_h, grad_last), num_chunks)
    a, b, grad_h = a.clone(), b.clone(), grad_h.clone()
    a[0, 4, 1] = b[0, 5, 1] = grad_h[0, 6, 1] = poison
    dirty = scan((a, b, h0, grad_h, grad_last), num_chunks)
    for name, value in clean.items():
        other = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
        other[0, 1] = False
        assert torch.equal(value.movedim(-1, 1)[other], dirty[name].movedim(-1, 1)[other]), name
    assert torch.equal(clean["h"][0, :4, 1], dirty["h"][0, :4, 1])
    assert not dirty["h"][0, 5:, 1].isfinite().any()
    assert not dirty["h_last"][0, 1].isfinite()


def test_chunks():
    """One pass if the chip is full; otherwise full tiles, at most four waves of two, no empty chunks."""
    tile = Tile(lanes=8, rows=16, channels=64)
    assert plan_chunks(8, 8192, 2048, tile, 132) == (1, 8192)
    assert plan_chunks(3, 8192, 2048, tile, 132) == (1, 8192)
    assert plan_chunks(1, 65536, 2048, tile, 132) == (32, 2048)
    assert plan_chunks(1, 128, 2048, tile, 132) == (1, 128)
    assert plan_chunks(0, 0, 0, tile, 132).number == 1
    for batch, time, width in itertools.product((1, 2, 7), (1, 100, 1000, 100_001), (1, 64, 1000)):
        chunks = plan_chunks(batch, time, width, tile, 132)
        assert chunks.length % tile.tokens == 0
        assert (chunks.number - 1) * chunks.length < time <= chunks.number * chunks.length
        assert chunks.number == 1 or chunks.number * batch * -(-width // 64) <= 8 * 132
