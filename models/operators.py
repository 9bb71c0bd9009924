"""Custom torch operators, named by a hash of their source and registered once.

A process may hold this package and remote-code copies of other versions of it. A second operator of the same
name would silently replace the first, also for existing models. So an operator's namespace contains a hash of
its source: the file that defines it and all files of its folder that this file imports. (Not all files of the
folder: remote code arrives file by file, the configuration's files before the model's.)
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers.dynamic_module_utils import get_relative_import_files


@functools.cache
def source_hash(module_file: str) -> str:
    """12 hex digits: hash of a module's file and of all files of its folder that it imports."""
    sources = sorted(
        {Path(module_file), *map(Path, get_relative_import_files(module_file))}, key=lambda path: path.name
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def namespace(module_file: str) -> str:
    """`minrnn_HASH`: the namespace of the operators that a module defines."""
    return f"minrnn_{source_hash(module_file)}"


def define(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `function` as the operator `minrnn_HASH::name`, and return a function that calls it.

    If another copy of the same source in this process has registered the operator, that one is called:
    registering it again would destroy it. A call with forward-mode tangents (`torch.func.jvp`) raises
    NotImplementedError: torch drops tangents if an operator has only a backward formula, and the derivative
    would be 0.

    Args:
        fake: returns empty outputs of the right shapes and dtypes.
        differentiate, save: backward formula and set-up of its context, as in
            `torch.library.register_autograd`.
    """
    space = namespace(inspect.getfile(function))
    operator = getattr(getattr(torch.ops, space), name, None)
    if operator is None:
        operator = torch.library.custom_op(f"{space}::{name}", function, mutates_args=())
        operator.register_fake(fake)
        if differentiate is not None:
            operator.register_autograd(differentiate, setup_context=save)

    def call(*arguments: Any) -> Any:
        if any(map(_has_tangent, arguments)):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative: use torch.autograd.grad, or backward()."
            )
        return operator(*arguments)

    return call


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
