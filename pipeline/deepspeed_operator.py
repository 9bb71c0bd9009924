"""DeepSpeed's operator for collectives on CPUs, compiled at its first use.

DeepSpeed compiles it through `torch.utils.cpp_extension`, which creates a file `lock` for the duration of a
compilation. A process that is killed while it compiles leaves that file behind, and every later process on
the machine waits for its removal without a message. So the operator is compiled in a folder that only this
package uses, by one process at a time, under a file lock that ends with its process. A `lock` that is there
when a process has its turn was left behind.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from accelerate.utils import patch_environment

from ..common.locks import lock
from ..common.output import warn


def _build_folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, "minrnn", f"py{sysconfig.get_python_version()}-torch{torch.__version__}")


def _remove_interrupted_builds(folder: Path, reason_without_lock: str | None) -> None:
    """Remove the builds that a killed process left unfinished, or name them.

    Args:
        reason_without_lock: why this process may not be alone in the folder; None if it is.
    """
    for path in folder.glob("*/lock"):
        if reason_without_lock is None:
            shutil.rmtree(path.parent)
        else:
            warn(
                f"DeepSpeed waits until {path} is gone; if no process is compiling there, remove it "
                f"({reason_without_lock}, so this cannot be told)"
            )


def compile_operator() -> None:
    """Compile or load DeepSpeed's operator for CPUs. DeepSpeed itself then uses the loaded one.

    Not a collective: processes take turns. Without a C++ compiler DeepSpeed works without the operator.

    Raises:
        OSError: the folder for compiled operators is not writable.
    """
    from deepspeed.comm.torch import build_shm_op

    folder = _build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "minrnn.lock").open("w") as file:
        _remove_interrupted_builds(folder, lock(file, wait=True))
        with patch_environment(TORCH_EXTENSIONS_DIR=folder):
            build_shm_op()
