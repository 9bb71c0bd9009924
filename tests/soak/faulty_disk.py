"""A disk that fails on command: compiles `faulty_disk.c`, and switches its faults on and off."""

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class FaultyDisk:
    """While a fault is on, calls on files below a folder fail, in processes started with `environment`.

    Args:
        folder: the folder whose files fail.
        work: the folder for the compiled library and the switch.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: there is no C compiler, or it fails.
    """

    def __init__(self, folder: Path, work: Path):
        library, self._control = work / "faulty_disk.so", work / "faulty_disk.control"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTY_DISK_FOLDER": f"{folder.resolve()}/",
            "FAULTY_DISK_CONTROL": str(self._control),
        }

    def switch_on(self, call: str, error: int) -> None:
        """Let `call` ("read", "write" or "fsync") fail with this errno."""
        partial = self._control.with_suffix(".part")
        partial.write_text(f"{call} {error}")
        os.replace(partial, self._control)

    def switch_off(self) -> None:
        """Let all calls succeed."""
        self._control.unlink(missing_ok=True)
