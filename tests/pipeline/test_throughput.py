"""Waiting for data is measured, logged and shown."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import Values

from minrnn.data import ChunkLoader
from minrnn.pipeline import throughput
from minrnn.pipeline.throughput import Rates, Throughput


def test_rates_are_means_since_the_last_line(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    measured = Throughput(tokens=1000)
    for wait, seconds in ((0.5, 5.0), (0.0, 1.0), (1.0, 1.0), (0.5, 1.0)):
        measured.add_wait(wait)
        clock[0] += seconds
    with measured.paused():
        clock[0] += 50.0
    assert measured.measure(1800) == Rates(100.0, 0.5, step_seconds=2.0, usual_step_seconds=1.0)
    for seconds in (3.0, 1.0):
        measured.add_wait(0.25)
        clock[0] += seconds
    assert measured.measure(1840) == Rates(10.0, 0.25, step_seconds=2.0, usual_step_seconds=2.0)


def test_a_single_first_step_is_the_usual_one(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    measured = Throughput(tokens=0)
    for _ in range(2):
        measured.add_wait(0.0)
        clock[0] += 5.0
        assert measured.measure(10).usual_step_seconds == 5.0


def test_a_run_says_how_long_it_waits_for_data(
    values: Values, run_recipe: Callable[[Values], Path], monkeypatch: pytest.MonkeyPatch, capfd
):
    values["train"] |= {"steps": 4, "log_every": 2, "eval_every": None, "save_every": None}
    original = ChunkLoader.take

    def slow(self: ChunkLoader, timeout: float | None = None):
        time.sleep(0.2)
        return original(self, timeout)

    monkeypatch.setattr(ChunkLoader, "take", slow)
    folder = run_recipe(values)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_seconds"] for line in lines if line["kind"] == "train"]
    assert len(waits) == 2
    assert all(wait >= 0.2 for wait in waits)
    last = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("step 4/4: "))
    waiting = re.search(r"waits for data (\d+)%", last)
    assert waiting is not None
    assert int(waiting[1]) > 3  # the first steps compile kernels
