"""A program whose output cannot be written continues, and exits with its own status."""

import io
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tqdm import tqdm

from minrnn.common.output import UnfailingStream

PROGRAM = """
    import os, sys
    sys.stdin is None or sys.stdin.close()
    from minrnn.common.output import secure_output, write_at_once
    secure_output()
    with open(sys.argv[1], "w") as file:
        for _ in range(1000):
            print("to standard output")
            print("to standard error", file=sys.stderr)
            write_at_once("from a signal handler")
        os.write(1, b"a library") if ">&-" in sys.argv[2] else None
        file.write("done")
    raise SystemExit(5)
"""


@pytest.mark.parametrize(
    "redirection",
    ["> /dev/full 2> /dev/full", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | head -c 1"],
)
def test_failed_writes_do_not_stop_a_program(redirection: str, tmp_path: Path):
    """They neither raise, nor change the exit status, nor end up in a file that was opened later."""
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = f'"$0" program.py written "{redirection}" {redirection}; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, check=False
    )
    assert (ended.returncode, (tmp_path / "written").read_text()) == (5, "done")


def test_characters_that_the_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    stream = UnfailingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("a café", file=stream)
    stream.flush()
    assert raw.getvalue() == b"a caf\\xe9\n"


def test_a_progress_bar_continues_on_a_closed_stream():
    file = io.StringIO()
    stream = UnfailingStream(file)
    with tqdm(total=3, file=stream, mininterval=0) as bar:
        bar.update()
        file.close()
        bar.update()
        tqdm.write("a line above it", file=stream)
    assert bar.n == 2
