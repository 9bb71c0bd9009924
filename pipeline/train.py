"""`python -m minrnn.pipeline.train --config RECIPE [--section.field VALUE ...]`, alone or under `accelerate launch`."""

import os
import sys

from ..data.output import secure_output


def main(argv: list[str] | None = None) -> None:
    """Read the recipe, train. A user's mistakes end it with status 2 and a line for each."""
    secure_output()  # before a library can open a file on a descriptor that is closed
    from ..data.errors import UserError
    from .errors import NonFiniteError, StorageError
    from .recipe import exit_with, help_text, read_recipe

    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return
    try:
        recipe = read_recipe(argv)
        from .loop import train

        train(recipe)
    except NonFiniteError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: training: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except StorageError as error:
        if error.errno is not None or os.environ.get("RANK", "0") == "0":  # reading fails in one process, writing in all together
            print(f"error: training: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        exit_with(error)
    except KeyboardInterrupt:
        print("Interrupted outside the training loop; what was saved stays as it is.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
