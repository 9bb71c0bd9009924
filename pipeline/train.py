"""The command `minrnn train`, and the module that `accelerate launch -m minrnn.pipeline.train` runs."""

import os
import sys

from ..common.output import conventional_exit, exit_on_error, secure_output
from .restarts import exit_if_final, record_error


def main(argv: list[str] | None = None) -> None:
    """Read the recipe and train. The exit status is 2 after a UserError, 1 after a failure of training."""
    secure_output()  # before a library opens a file on a closed standard descriptor
    exit_if_final()
    from ..common.errors import NonFiniteError, StorageError, UserError
    from .recipe import help_text, read_recipe
    from .run_log import take_verbosity

    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return
    with exit_on_error("training"):
        try:
            argv, verbosity = take_verbosity(argv)
            recipe = read_recipe(argv)
            from .loop import train

            train(recipe, verbosity)
        except (UserError, NonFiniteError, StorageError) as error:
            status = 2 if isinstance(error, UserError) else 1
            record_error(error, status)
            # All processes have the same error, except where one alone cannot read a file.
            is_of_one = isinstance(error, StorageError) and error.errno is not None
            if os.environ.get("RANK", "0") == "0" or is_of_one:
                raise
            raise SystemExit(status) from None
        except KeyboardInterrupt:
            print("Interrupted outside the training loop; what was saved stays as it is.", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    with conventional_exit():
        main()
