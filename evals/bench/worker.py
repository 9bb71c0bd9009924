"""A contender in a process of its own, so that its memory is its own, and its death too.

    parent   spec (JSON line) ->     <- {"info": ...}     "turn" ->     <- {"seconds": ..., "peak_bytes": ...}     ...     end of file ->

A spec names a module of this package whose `build_work(spec)` gives a `Work`. `contest` runs several of them in rotation: on the CPU each in a
fresh interpreter (the resident set is per process, and a contender that the kernel kills for want of memory is a reason, not the end of the
bench), on a GPU in this process (torch counts GPU memory by allocation, and each process would pay for a CUDA context of its own).
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
from .measure import Timing, Turn, Unavailable, reason_of, round_robin

PROTOCOL_STREAM = (
    3  # the child's copy of its standard output; whatever a library prints goes to standard error
)


class Work(Protocol):
    """A contender, built and ready."""

    info: dict[str, Any]
    """What is to be known of it: parameters, sizes, notes."""

    def turn(self) -> dict[str, float]:
        """Do the work; `seconds` of one unit of it, `peak_bytes` above what the process held before the work was built."""
        ...


def build(spec: Mapping[str, Any]) -> Work:
    """The work that a spec names."""
    return importlib.import_module(f".{spec['module']}", __package__).build_work(spec)


class FreshWork:
    """A work in a fresh interpreter, which begins with its imports at once.

    Args:
        spec: JSON-able; see `build`.
        limit: seconds after which an answer is no longer waited for; infinite if it may take as long as it likes.
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
        """Have the work built; it tells its info."""
        self.info = self._ask(json.dumps(dict(self.spec)))["info"]

    def turn(self) -> dict[str, float]:
        """One turn over there."""
        return self._ask("turn")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its death is told below
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], None if math.isinf(self.limit) else self.limit)[
            0
        ]:
            self._process.kill()
            raise Unavailable(f"no answer within {self.limit:g} s (--limit)")
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            if status == -9:
                raise Unavailable("killed, as the kernel does when memory runs out")
            self._errors.seek(0)
            last = ([line.strip() for line in self._errors if line.strip()] or ["no message"])[-1]
            raise Unavailable(f"its process ended with status {status}: {last[:300]}")
        told = json.loads(answer)
        if "reason" in told:
            raise Unavailable(told["reason"])
        return told

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def contest(
    specs: Mapping[str, Mapping[str, Any]],
    rounds: int,
    limit: float,
    fresh: bool,
    others: Mapping[str, Turn],
    bar: Any,
) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Build every contender, then give each its turns, in rotation.

    Args:
        specs: by contender.
        rounds: turns of each.
        limit: seconds that a contender may take to be built, or for one answer; and the patience of `round_robin`.
        fresh: each in a process of its own.
        others: turns in this process, in the same rotation (the ceilings).
        bar: a tqdm bar, or None.

    Returns:
        Timings by name, and the info of those that were built.
    """
    failed: dict[str, str] = {}
    works: dict[str, Work | FreshWork] = {}
    processes = {name: FreshWork(spec, limit) for name, spec in specs.items()} if fresh else {}
    try:
        for name, spec in specs.items():
            if bar is not None:
                bar.set_postfix_str(f"building {name}", refresh=True)
            try:
                if fresh:
                    processes[name].build()
                works[name] = processes[name] if fresh else build(spec)
            except Exception as error:  # a reason, and the others go on
                failed[name] = reason_of(error)
        turns: dict[str, Turn] = {**others, **{name: work.turn for name, work in works.items()}}
        timings = round_robin(turns, rounds, limit, bar)
    finally:
        for process in processes.values():
            process.close()
    timings |= {name: Timing(reason=reason) for name, reason in failed.items()}
    return timings, {name: work.info for name, work in works.items()}


def main() -> None:
    """Serve one work over the pipe, until the other side closes it."""
    os.dup2(1, PROTOCOL_STREAM)
    os.dup2(2, 1)
    with os.fdopen(PROTOCOL_STREAM, "w") as answers:

        def answer(told: dict[str, Any]) -> None:
            answers.write(json.dumps(told) + "\n")
            answers.flush()

        try:
            work = build(json.loads(sys.stdin.readline()))
            answer({"info": work.info})
            while sys.stdin.readline():
                answer(work.turn())
        except Exception as error:
            answer({"reason": reason_of(error)})
            raise


if __name__ == "__main__":
    with conventional_exit():
        main()
