"""A disk that fails for a while: `faulty_disk.c`, compiled and switched on and off."""

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class FaultyDisk:
    """Calls on files below a folder, which processes started with `environment` make, fail while a fault is switched on.

    Args:
        folder: whose files are concerned.
        work: where the compiled library and the switch are put.

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
        """From now on `call` ("read", "write" or "fsync") fails with this errno."""
        partial = self._control.with_suffix(".part")
        partial.write_text(f"{call} {error}")
        os.replace(partial, self._control)

    def switch_off(self) -> None:
        """All calls succeed again."""
        self._control.unlink(missing_ok=True)
