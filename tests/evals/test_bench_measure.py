"""Rotation of turns, ceilings, failure reasons, and contenders in processes of their own."""

import math
import subprocess
import sys
import time

import psutil
import pytest
import torch

from minrnn.evals.bench.measure import (
    Stopwatch,
    Unavailable,
    ceiling_rows,
    default_ceilings,
    failure_reason,
    peer_module,
    round_robin,
    when_idle,
    without_preparation,
)
from minrnn.evals.bench.worker import ProcessWork, run_contest
from minrnn.evals.memory import available_bytes, current_memory, peak_memory, reset_peak_memory
from minrnn.evals.output import si, table
from minrnn.evals.record import command_line

CPU = torch.device("cpu")
SPEC = {
    "module": "train",
    "family": "gru",
    "params": 100_000,
    "layers": 1,
    "dtype": "fp32",
    "device": "cpu",
    "threads": 1,
    "seed": 0,
}
SPEC |= {"min_seconds": 0, "compile": False, "batch": 1, "length": 8, "chunk": 8}


def test_contenders_take_turns():
    order = []
    turns = {
        name: lambda name=name: order.append(name) or {"seconds": 1.0, "peak_bytes": len(order)}
        for name in "ab"
    }
    timings = round_robin(turns, rounds=3, limit=100, bar=None)
    assert order == ["a", "b"] * 3
    assert timings["b"].row() == {"seconds": [1.0] * 3, "median_seconds": 1.0, "peak_bytes": 6}


def test_failing_contenders_are_out_and_slow_ones_stop_early():
    def failing():
        raise RuntimeError("broken\nin two lines")

    timings = round_robin({"bad": failing, "good": lambda: {"seconds": 1.0}}, rounds=3, limit=-1, bar=None)
    assert timings["bad"].row() == {"reason": "RuntimeError: broken"}
    assert timings["good"].seconds == [1.0]


def test_the_stopwatch_warms_up_before_the_clock():
    calls = []
    watch = Stopwatch(without_preparation(lambda: calls.append(1)), CPU, min_seconds=0)
    assert watch()["seconds"] > 0
    assert len(calls) == 3  # cold, warm, clocked


def test_ceilings_are_positive_and_finite():
    ceilings = default_ceilings(CPU, torch.bfloat16, tiny=True)
    timings = round_robin(
        {name: Stopwatch(without_preparation(c.function), CPU, 0) for name, c in ceilings.items()},
        2,
        100,
        None,
    )
    rows = ceiling_rows(timings, ceilings)
    assert set(rows) == {"copy", "torch.add", "matmul"}
    assert all(row["rate"] > 0 and math.isfinite(row["rate"]) for row in rows.values())


def test_peak_memory_sees_what_was_freed():
    reset_peak_memory(CPU)
    before = current_memory(CPU)
    torch.ones(2**25).sum()
    assert peak_memory(CPU) - before > 100e6
    assert available_bytes(CPU) > 0


def test_failure_reasons():
    assert failure_reason(MemoryError("no more")) == "out of memory: no more"
    assert failure_reason(Unavailable("needs CUDA")) == "needs CUDA"
    with pytest.raises(Unavailable, match="the package nowhere is missing: pip install no-where"):
        peer_module("nowhere.at.all", "no-where")


def test_a_process_that_cannot_build_reports_the_reason():
    timings, infos = run_contest({"x": {**SPEC, "params": 10}}, 1, math.inf, True, {}, None)
    message = "no gru of 1 layers has 10 parameters within 2%; the nearest has 276, with a width of 1"
    assert timings["x"].reason == message
    assert infos == {}


def test_a_process_that_does_not_answer_in_time_is_ended():
    work = ProcessWork(SPEC, limit=0.01)
    with pytest.raises(Unavailable, match=r"no answer within 0.01 s; .* --limit 0.1 waits longer"):
        work.build()
    work.close()


def test_the_end_of_a_process_becomes_a_reason():
    work = ProcessWork(SPEC, limit=math.inf)
    work.build()
    work._process.kill()
    with pytest.raises(Unavailable, match="killed, as the kernel does"):
        work.turn()
    work.close()


def test_the_command_line_is_recorded_without_the_output_path():
    argv = "--out /home/me/x.json --rounds 3 --out=y.json /home/me/model --corpus=/home/me/a.txt".split()
    assert command_line("minrnn bench scan", argv) == "minrnn bench scan --rounds 3 model --corpus=a.txt"


def test_a_table_shows_reasons():
    rows = [{"contender": "a", "seconds": [1.0], "rate": 2e9}, {"contender": "bc", "reason": "needs CUDA"}]
    text = table(
        rows, {"": lambda row: row["contender"], "rate": lambda row: si(row["rate"], "B/s")}, "title"
    )
    assert text.splitlines()[1:] == ["title", "     rate", "a   2GB/s", "bc  - needs CUDA"]


def test_a_turn_waits_for_workers_that_are_busy():
    code = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\ninput()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    process, used = psutil.Process(worker.pid), []
    try:
        while sum(process.cpu_times()[:2]) < 0.1:
            time.sleep(0.01)
        when_idle(lambda: used.append(sum(process.cpu_times()[:2])) or {})()
        assert used[0] >= 1.4
    finally:
        worker.kill()
        worker.communicate()
