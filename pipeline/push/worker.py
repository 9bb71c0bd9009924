"""The process of a push beside training. It prints one line of JSON: what it pushed, or what went wrong."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(argument: str) -> dict[str, Any]:
    """Push a checkpoint.

    Args:
        argument: JSON of {"run", "checkpoint", "trust", "nice", "options"}.

    Returns:
        {"message", "warning", "step"}, or {"kind", "error"}.
    """
    import transformers

    from ...common.errors import UserError
    from ..checkpoint import read_manifest
    from .commit import kept_card_message, push_run, pushed_message
    from .files import Checkpoint
    from .target import PushOptions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    values = json.loads(argument)
    run, path, options = Path(values["run"]), Path(values["checkpoint"]), PushOptions(**values["options"])
    try:
        checkpoint = Checkpoint(run, path, read_manifest(path))
        pushed = push_run(run, options, trust_remote_code=values["trust"], checkpoint=checkpoint)
    except UserError as error:
        message = "; ".join(text for _, text in error.errors)
        return {"kind": getattr(error, "kind", "setting"), "error": message}
    except (OSError, ValueError) as error:  # a checkpoint that was removed, a full disk
        return {"kind": type(error).__name__, "error": f"{path.name}: {error}"}
    warning = kept_card_message(pushed, options) if pushed.kept_card else None
    return {"message": pushed_message(pushed), "warning": warning, "step": pushed.step}


if __name__ == "__main__":
    with contextlib.suppress(AttributeError, OSError):  # Windows has no nice
        os.nice(json.loads(sys.argv[1])["nice"])
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        result = main(sys.argv[1])
    print(json.dumps(result))
