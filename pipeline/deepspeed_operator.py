"""DeepSpeed's operator for collectives on CPUs, compiled at its first use.

DeepSpeed compiles it through `torch.utils.cpp_extension`, which marks a compilation in progress with a file.
A process that is killed while it compiles leaves that file behind, and every later process on the machine
waits for its removal without a message. So the operator is compiled in a folder that only this package uses,
by one process at a time, under a lock that ends with its process: a mark that is found there is an old one.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from ..common.locks import lock


def _folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, "minrnn", f"py{sysconfig.get_python_version()}-torch{torch.__version__}")


def _remove_marks(folder: Path) -> None:
    for mark in folder.glob("*/lock"):
        # With all that the killed process has compiled: parts of it may be incomplete.
        shutil.rmtree(mark.parent)


def compile_operator() -> None:
    """Compile or load DeepSpeed's operator for CPUs; DeepSpeed itself then finds it loaded.

    Not a collective: processes take turns. Without a C++ compiler DeepSpeed works without the operator.

    Raises:
        OSError: if the folder for compiled operators cannot be written to.
    """
    from deepspeed.comm.torch import build_shm_op

    folder, given = _folder(), os.environ.get("TORCH_EXTENSIONS_DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "minrnn.lock").open("w") as file:
        if lock(file, wait=True) is None:
            _remove_marks(folder)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            build_shm_op()
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if given is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = given
