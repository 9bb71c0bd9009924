"""Processes that hang, and batches that are skipped."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import Values, losses, recipe_file

from minrnn.common.errors import NonFiniteError, UserError
from minrnn.data import byte_tokenizer
from minrnn.models import MinRNNCache
from minrnn.pipeline import loop
from minrnn.pipeline.watchdog import EXIT_STATUS, Heartbeat, suspects

Run = Callable[[Values], Path]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=8))
def test_suspects_are_silent_or_else_furthest_behind(processes):
    before = [Heartbeat(rank, "host", 1, 9, mark, "") for rank, (_, mark) in enumerate(processes)]
    now = [
        Heartbeat(rank, "host", 1 if silent else 2, 9, mark, "")
        for rank, (silent, mark) in enumerate(processes)
    ]
    silent = [rank for rank, (is_silent, _) in enumerate(processes) if is_silent]
    behind = [rank for rank, (_, mark) in enumerate(processes) if mark == min(mark for _, mark in processes)]
    assert [heartbeat.rank for heartbeat in suspects(before, now)] == (silent or behind)


STORE = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, 2, True, timeout=timedelta(seconds=60), wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""
PEER = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from minrnn.pipeline.watchdog import Watchdog
timeout = timedelta(seconds=600)
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timeout=timeout, wait_for_workers=False)
with Watchdog(1, 2, 1.0, store) as watchdog:
    watchdog.enter("step 1: computing")
    print("watched", flush=True)
    while True:
        time.sleep(0.1)
        if sys.argv[2] == "moves":
            watchdog.move()
"""


@pytest.mark.parametrize(
    ("moves", "is_stopped", "message"),
    [
        (
            "moves",
            True,
            "the store has not answered for 1 seconds (no answer); rank 0 on 127.0.0.1, which holds it, "
            "hangs or is gone",
        ),
        (
            "hangs",
            True,
            "the store has not answered for 1 seconds (no answer); rank 0 on 127.0.0.1, which holds it, "
            "hangs or is gone",
        ),
        (
            "hangs",
            False,
            "nothing has moved for 1 seconds; waiting for rank 0 on a host unknown (has not come so far)",
        ),
    ],
)
def test_a_stopped_store_and_a_missing_process_are_named(moves: str, is_stopped: bool, message: str):
    """A stopped store raises nothing: a call to it never returns."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    with subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        command = [sys.executable, "-c", PEER, holder.stdout.readline().strip(), moves]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as peer:
            assert peer.stdout is not None
            assert peer.stdout.readline() == "watched\n"
            if is_stopped:
                holder.send_signal(signal.SIGSTOP)
            stderr = peer.communicate(timeout=300)[1]
        holder.kill()
    assert peer.returncode == EXIT_STATUS
    assert f"error: training: rank 1: {message}" in stderr


HANGS_IN_SET_UP = """
import os, sys, time
from minrnn.pipeline import set_up, watchdog
watchdog.SET_UP_SECONDS = 2.0
if os.environ["RANK"] == "1":
    set_up._open = lambda *_: time.sleep(600)
from minrnn.pipeline.train import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_that_hangs_in_the_set_up_is_named(values: Values, tmp_path: Path):
    values["train"]["peer_timeout"] = 10.0
    (tmp_path / "program.py").write_text(HANGS_IN_SET_UP)
    config = Path(__file__).parents[2] / "launch" / "accelerate" / "cpu.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        str(tmp_path / "program.py"),
    ]
    ended = subprocess.run(
        [*launcher, "--config", str(recipe_file(values, tmp_path))],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode != 0
    moved = r"error: training: rank [01]: nothing has moved for 12 seconds"
    assert re.search(rf"{moved}; waiting for rank 1 on \S+ \(opening data and model\)\.", ended.stderr)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: dict[int, float]) -> None:
    """Multiply the losses of these steps by these factors."""
    original = loop.take_step

    def one_step(run: loop.Run, step: int, *arguments):
        forward = run.engine.forward

        def spoilt(**inputs):
            output = forward(**inputs)
            output.loss = output.loss * steps.get(step, 1.0)
            return output

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(run.engine, "forward", spoilt)
            return original(run, step, *arguments)

    monkeypatch.setattr(loop, "take_step", one_step)


def test_spikes_are_skipped_also_after_a_resume(values: Values, run_recipe: Run, tmp_path: Path, monkeypatch):
    values["train"] |= {"steps": 24, "save_every": 12, "eval_every": None, "skip_spikes": 3.0}
    spoil(monkeypatch, {5: float("nan"), 15: 100.0, 20: float("inf")})
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    with monkeypatch.context() as patched:
        inner = loop.take_step

        def stop_after_12(run, step, *arguments):
            if step == 14:
                raise KeyboardInterrupt
            return inner(run, step, *arguments)

        patched.setattr(loop, "take_step", stop_after_12)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(values)
    resumed = run_recipe(values)
    for folder in (undisturbed, resumed):
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries if "skipped" in entry] == [5, 15, 20]
    assert [loss for step, loss in losses(undisturbed) if step not in (5, 20)] == [
        loss for step, loss in losses(resumed) if step not in (5, 20)
    ]


def test_too_many_spikes_stop_the_run(values: Values, run_recipe: Run, monkeypatch):
    values["train"] |= {"skip_spikes": 3.0, "max_skips": 2}
    spoil(monkeypatch, dict.fromkeys(range(6, 13), float("nan")))
    with pytest.raises(
        NonFiniteError, match=r"step 8: loss nan; 2 batches in a row were left out before \(train.max_skips\)"
    ):
        run_recipe(values)


def test_the_count_of_skips_survives_a_resume(values: Values, run_recipe: Run, monkeypatch):
    values["train"] |= {"steps": 24, "save_every": 12, "eval_every": None, "skip_spikes": 3.0, "max_skips": 2}
    spoil(monkeypatch, dict.fromkeys((11, 12, 13), float("nan")))
    with monkeypatch.context() as patched:
        inner = loop.take_step

        def stop_after_12(run, step, *arguments):
            if step == 13:
                raise KeyboardInterrupt
            return inner(run, step, *arguments)

        patched.setattr(loop, "take_step", stop_after_12)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(values)
    with pytest.raises(NonFiniteError, match=r"step 13: loss nan; 2 batches in a row were left out before"):
        run_recipe(values)


def test_states_that_are_not_finite_are_reset():
    cache = MinRNNCache(2)
    for layer in cache.layers:
        layer.replace(torch.ones(3, 4), torch.ones(3, 2, 5), num_tokens=7)
    recurrent = cache.layers[1].recurrent
    assert recurrent is not None
    recurrent[1, 2] = float("nan")
    cache.zero_non_finite_rows_()
    for layer in cache.layers:
        assert layer.recurrent is not None
        assert layer.conv is not None
        assert layer.recurrent.sum(1).tolist() == [4, 0, 4]
        assert layer.conv.sum((1, 2)).tolist() == [10, 0, 10]
    assert cache.get_seq_length() == 7


def test_another_tokenizer_of_the_same_name_is_refused(values: Values, run_recipe: Run, tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    run_recipe(values)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values["train"]["steps"] = 14
    with pytest.raises(UserError, match=r"data.tokenizer: .* is not the tokenizer that the run began with"):
        run_recipe(values)
