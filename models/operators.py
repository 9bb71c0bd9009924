"""Our custom operators: how they are named, and made once.

A process may hold this package and remote-code copies of other versions of it. A second operator of the same
name would silently replace the first, for models that exist already too. So an operator's namespace holds a
hash of the source it is made of: the file that defines it and all that this file imports from beside it. (Not
of all that lies there: remote code arrives file by file, the configuration's before the model's.)
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
    """12 hex digits: hash of a module's file and of all that it imports from its folder, directly or not."""
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
    """Make `function` the operator `minrnn_HASH::name`, and return what calls it.

    Where another copy of this very source in the process has made it, that one is called, since to make it
    again would destroy the other's. Called with forward-mode tangents (`torch.func.jvp`), it raises
    NotImplementedError: torch would drop them where an operator has a backward formula alone, and the
    derivative would be 0.

    Args:
        fake: gives empty outputs of the right shapes and dtypes.
        differentiate, save: backward formula and what it keeps, as in `torch.library.register_autograd`.
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
