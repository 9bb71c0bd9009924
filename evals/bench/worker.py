"""Runs a contender in a process of its own, so that its memory is measured alone and its crash does not end
the benchmark.

    parent:   spec (a JSON line)    "turn"                                 "turn" ...   end of file
    child:    {"info": ...}         {"seconds": ..., "peak_bytes": ...}    ...

A spec names a module of this package whose `build_work(spec)` returns a `Work`. `run_contest` runs several of
them in rotation: on the CPU each in a fresh interpreter (the resident set is per process, and a contender
that the kernel kills for lack of memory becomes a row with a reason), on a GPU in this process (torch counts
GPU memory by allocation, and each process would need its own CUDA context).
"""

import contextlib
import importlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

from ...common.output import conventional_exit
from .measure import Timing, Turn, Unavailable, failure_reason, round_robin

# The child's copy of its standard output; output of libraries goes to standard error.
PROTOCOL_STREAM = 3


class Work(Protocol):
    """A contender, built and ready."""

    info: dict[str, Any]
    """Facts for the record: parameters, sizes, notes."""

    def turn(self) -> dict[str, float]:
        """Do the work; returns `seconds` of one unit, and `peak_bytes` above the memory before the work was
        built.
        """
        ...


def build(spec: Mapping[str, Any]) -> Work:
    """Build the work that a spec names."""
    return importlib.import_module(f".{spec['module']}", __package__).build_work(spec)


class ProcessWork:
    """A work in a fresh interpreter, which starts importing at once.

    Args:
        spec: JSON-serializable; see `build`.
        limit: seconds to wait for an answer; may be infinite.
    """

    def __init__(self, spec: Mapping[str, Any], limit: float):
        self.spec, self.limit = spec, limit
        self.info: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"])}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def build(self) -> None:
        """Build the work in the process and get its info."""
        self.info = self._request(json.dumps(dict(self.spec)))["info"]

    def turn(self) -> dict[str, float]:
        """Take one turn in the process."""
        return self._request("turn")

    def _request(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the end of the process is reported below
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        timeout = None if math.isinf(self.limit) else self.limit
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise Unavailable(
                f"no answer within {self.limit:g} s; it is slow here, or the machine is busy: "
                f"--limit {10 * self.limit:g} waits longer"
            )
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            if status == -9:
                raise Unavailable("killed, as the kernel does when memory runs out")
            self._errors.seek(0)
            last = ([line.strip() for line in self._errors if line.strip()] or ["no message"])[-1]
            raise Unavailable(f"its process ended with status {status}: {last[:300]}")
        result = json.loads(answer)
        if "reason" in result:
            raise Unavailable(result["reason"])
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def run_contest(
    specs: Mapping[str, Mapping[str, Any]],
    rounds: int,
    limit: float,
    in_processes: bool,
    others: Mapping[str, Turn],
    bar: Any,
) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Build every contender, then give them turns in rotation.

    Args:
        specs: by contender.
        rounds: turns of each.
        limit: seconds that a contender may take to be built and for one answer; also the limit of
            `round_robin`.
        in_processes: run each contender in a process of its own.
        others: turns in this process that join the rotation (the ceilings).
        bar: a tqdm bar, or None.

    Returns:
        Timings by name, and the info of the contenders that were built.
    """
    failed: dict[str, str] = {}
    works: dict[str, Work | ProcessWork] = {}
    processes = {name: ProcessWork(spec, limit) for name, spec in specs.items()} if in_processes else {}
    try:
        for name, spec in specs.items():
            if bar is not None:
                bar.set_postfix_str(f"building {name}", refresh=True)
            try:
                if in_processes:
                    processes[name].build()
                works[name] = processes[name] if in_processes else build(spec)
            except Exception as error:  # becomes a reason; the others continue
                failed[name] = failure_reason(error)
        turns: dict[str, Turn] = {**others, **{name: work.turn for name, work in works.items()}}
        timings = round_robin(turns, rounds, limit, bar)
    finally:
        for process in processes.values():
            process.close()
    timings |= {name: Timing(reason=reason) for name, reason in failed.items()}
    return timings, {name: work.info for name, work in works.items()}


def main() -> None:
    """Serve one work over the pipe until the other side closes it."""
    os.dup2(1, PROTOCOL_STREAM)
    os.dup2(2, 1)
    with os.fdopen(PROTOCOL_STREAM, "w") as answers:

        def answer(result: dict[str, Any]) -> None:
            answers.write(json.dumps(result) + "\n")
            answers.flush()

        try:
            work = build(json.loads(sys.stdin.readline()))
            answer({"info": work.info})
            while sys.stdin.readline():
                answer(work.turn())
        except Exception as error:
            answer({"reason": failure_reason(error)})
            raise


if __name__ == "__main__":
    with conventional_exit():
        main()
