"""The building blocks of the numba kernels: elementary functions, bfloat16, tasks on threads."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
import torch
from helpers import generator

import minrnn.models.numba_support as support
from minrnn.models.cell_scan_numba import _factors, _output_gate, _tanh

UNIT = 2.0**-23  # one unit in the last place of an fp32 number, relative to it


def mapped(function, x: np.ndarray) -> np.ndarray:
    """function(x), in a loop that vectorises as the kernels' do."""

    @numba.njit(error_model="numpy")
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.full_like(x, np.nan)
    loop(x, y)
    return y


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(value / exact - 1).max())


@pytest.fixture(scope="module")
def normal_range() -> np.ndarray:
    """A million fp32 numbers whose exponential is a normal number, dense around 0."""
    everywhere = np.linspace(-87.3, 88.3, 500_001)
    near_zero = 10.0 ** np.linspace(-30, 1, 250_000)
    return np.concatenate([everywhere, near_zero, -near_zero]).astype(np.float32)


def test_exp_is_right_to_the_last_place(normal_range):
    assert (
        relative_error(mapped(support.exp, normal_range), np.exp(normal_range.astype(np.float64)))
        < 0.8 * UNIT
    )


def test_expm1_is_right_to_the_last_places(normal_range):
    exact = np.expm1(normal_range.astype(np.float64))
    assert relative_error(mapped(support.expm1, normal_range), exact) < 2 * UNIT


def test_gelu_and_its_derivative():
    """Within 2e-7 of the larger of 1 and |x|; finite, however large x is."""
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([1e4, -1e4, 1e30, -1e30])])

    @numba.njit(error_model="numpy")
    def loop(x, y, slope):
        for i in range(x.size):
            y[i], slope[i] = _output_gate(x[i], 3)

    y, slope, exact = torch.empty_like(x), torch.empty_like(x), x.double().requires_grad_()
    loop(x.numpy(), y.numpy(), slope.numpy())
    expected = torch.nn.functional.gelu(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert ((y - expected).abs() <= 2e-7 * exact.abs().clamp(min=1)).all()
    assert ((slope - expected_slope).abs() <= 3e-7).all()


def test_sigmoid_is_right_to_the_last_places(normal_range):
    assert (
        relative_error(
            mapped(support.sigmoid, normal_range), 1 / (1 + np.exp(-normal_range.astype(np.float64)))
        )
        < 1.5 * UNIT
    )


def test_tanh_keeps_its_digits_near_zero(normal_range):
    assert relative_error(mapped(_tanh, normal_range), np.tanh(normal_range.astype(np.float64))) < 2.5 * UNIT


def test_ends_of_the_range():
    """NaN passes; results are clamped, so that nothing divides by 0 or multiplies 0 by infinity."""
    ends = np.array([np.nan, np.inf, 1e4, -1e4, -np.inf, 0.0, -0.0], np.float32)
    assert np.allclose(
        mapped(support.exp, ends),
        np.exp(np.array([np.nan, 88.3, 88.3, -87.3, -87.3, 0, 0])),
        rtol=1e-5,
        atol=0,
        equal_nan=True,
    )
    values = mapped(support.sigmoid, ends)
    assert np.isnan(values[0])
    assert list(values[1:3]) == [1, 1]
    assert 0 <= values[3:5].max() < 1e-38
    assert list(values[5:]) == [0.5, 0.5]
    assert np.array_equal(mapped(_tanh, ends)[1:], np.array([1, 1, -1, -1, 0, 0], np.float32))


@pytest.mark.parametrize("cell", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 8.0, 30.0])
def test_factors(cell, scale):
    """a and z in fp32 are exact to two units of 2^-24 near 1, and relatively near 0.

    A minLSTM takes exp(-p - max(-p, -q)): the difference is rounded by 2^-24 of its size.
    """

    @numba.njit(error_model="numpy")
    def loop(p, q, a, z):
        for i in range(p.size):
            a[i], z[i] = _factors(p[i], q[i], support.ZERO, False, cell)

    p, q = (scale * torch.randn(2, 200_000, generator=generator(1))).numpy()
    a, z = np.full_like(p, np.nan), np.full_like(p, np.nan)
    loop(p, q, a, z)
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    log_ratio = p64 if cell == 0 else np.logaddexp(0, -p64) - np.logaddexp(0, -q64)
    for value, exact in ((a, 1 / (1 + np.exp(log_ratio))), (z, 1 / (1 + np.exp(-log_ratio)))):
        assert ((value >= 0) & (value <= 1)).all()
        assert np.abs(value - exact)[exact > 0.5].max() <= 2 * 2**-24
        usual = exact > 1e-30
        assert relative_error(value[usual], exact[usual]) < (3 + cell * np.abs(p - q).max() / 2) * UNIT


@numba.njit(error_model="numpy")
def copy(x, y):
    for i in range(x.size):
        support.store_output(y, i, support.load_input(x, i))


def test_every_bfloat16_is_read_and_written():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    numbers = bits.view(torch.bfloat16)
    wide, narrow = torch.empty(2**16), torch.empty(2**16, dtype=torch.bfloat16)
    copy(support.as_numpy(numbers), support.as_numpy(wide))
    assert torch.equal(wide.nan_to_num(7), numbers.float().nan_to_num(7))
    assert torch.equal(wide.isnan(), numbers.isnan())
    copy(support.as_numpy(numbers), support.as_numpy(narrow))
    assert torch.equal(narrow.view(torch.uint16)[~numbers.isnan()], bits[~numbers.isnan()])
    assert narrow[numbers.isnan()].isnan().all()


def test_rounding_to_bfloat16_matches_torch():
    """To nearest, ties to even, for any bits: half-way cases, subnormals, overflow to infinity, every NaN."""
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=generator(2), dtype=torch.int64)
    ties = (random & ~0xFFFF) | 0x8000
    wide = torch.cat([random, ties, ties + 1, ties - 1]).to(torch.int32).view(torch.float32)
    actual = torch.empty(wide.shape, dtype=torch.bfloat16)
    copy(support.as_numpy(wide), support.as_numpy(actual))
    expected = wide.bfloat16()
    assert torch.equal(actual.isnan(), wide.isnan())
    assert torch.equal(actual[~wide.isnan()].view(torch.uint16), expected[~wide.isnan()].view(torch.uint16))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7, 100])
def test_every_task_is_run_once(num_threads, num_tasks):
    torch.set_num_threads(num_threads)
    done, threads = [], set()

    def kernel(what, first, last):
        assert what == "argument"
        done.extend(range(first, last))
        threads.add(threading.current_thread())

    support.run_tasks(kernel, ("argument",), num_tasks)
    assert sorted(done) == list(range(num_tasks))
    assert len(threads) <= max(1, min(num_threads, num_tasks))


def test_an_error_in_a_thread_is_raised():
    torch.set_num_threads(3)

    def kernel(first, last):
        if first > 0:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        support.run_tasks(kernel, (), 3)


WITHOUT_KERNELS = """
import torch
from minrnn.models import MinRNNConfig, MinRNNForCausalLM

model = MinRNNForCausalLM(MinRNNConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2))
ids = torch.arange(32).view(2, 16) % 16
model(ids, labels=ids).loss.backward()
model(ids, labels=ids).loss.backward()
assert not torch.stack([parameter.grad.norm() for parameter in model.parameters()]).isnan().any()
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_DISABLE_JIT": "1"},
        pytest.param({"NUMBA_DISABLE_JIT": "1", "PYTHONOPTIMIZE": "2"}, marks=pytest.mark.slow),
        pytest.param({"PYTHONOPTIMIZE": "2"}, marks=pytest.mark.slow),
    ],
)
def test_models_train_under_settings_of_the_environment(environment, tmp_path):
    """Without numba's compiler, torch is used, with one warning; without docstrings nothing changes."""
    variables = os.environ | environment
    if "PYTHONOPTIMIZE" in environment:
        variables["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # of all packages, for this test alone
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], env=variables, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    warnings = [line for line in finished.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == ("NUMBA_DISABLE_JIT" in environment)
    assert all("switched off (NUMBA_DISABLE_JIT)" in line for line in warnings)


FORKED = """
import multiprocessing, os, sys, torch
from datasets import Dataset
from torch.utils.data import DataLoader
from minrnn.models import MinRNNConfig, MinRNNForCausalLM

torch.set_num_threads(2)
model = MinRNNForCausalLM(MinRNNConfig(vocab_size=16, hidden_size=256, num_hidden_layers=1))
ids = torch.arange(1024).view(4, 256) % 16

def loss(row=None):
    return model(ids, labels=ids).loss.item()

def train():
    model(ids, labels=ids).loss.backward()
    torch.randn(1000, 1000).sigmoid()
    return torch.get_num_threads()

expected = loss()
train()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(loss, range(2), chunksize=1) == [expected] * 2
    assert pool.apply(train) == 1
loader = DataLoader(range(2), batch_size=1, num_workers=1, multiprocessing_context="fork", collate_fn=loss)
assert list(loader) == [expected] * 2
rows = Dataset.from_dict({"x": [0, 1]}).map(lambda row: {"loss": loss()}, num_proc=2)
assert rows["loss"][:] == [expected] * 2
assert torch.get_num_threads() == 2 and loss() == expected
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_computes_what_its_parent_does(tmp_path):
    """The parent has used its threads before the fork. A child that waits for them runs into the timeout."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKED],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]


@pytest.mark.parametrize(
    ("num_threads", "batch", "width", "expected"),
    [
        (1, 1, 100, 100),
        (3, 1, 100, 100),
        (8, 1, 100, 13),
        (8, 2, 100, 25),
        (8, 3, 100, 100),
        (4, 0, 100, 25),
        (64, 1, 3, 1),
    ],
)
def test_rows_are_striped_where_many_threads_would_idle(num_threads, batch, width, expected):
    torch.set_num_threads(num_threads)
    assert support.stripe_width(batch, width) == expected
