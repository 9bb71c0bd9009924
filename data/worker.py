"""The worker process of `worker_process.WorkerProcess`: `python -m minrnn.data.worker`.

It reads a job from standard input and writes pickled items to standard output.
"""

import os
import pickle
import signal
import sys
import traceback

from ..common.errors import UserError, one_line_message
from ..common.output import secure_output
from .worker_process import Job


def _error_to_send(error: BaseException, job: Job) -> Exception:
    """The error to send to the run.

    An unexpected one also prints its traceback to stderr, for a bug report.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        return UserError("data.corpus", f"{job.source}: there is not enough memory to read it; {job.advice}")
    traceback.print_exception(error)
    return RuntimeError(f"a data worker failed while reading {job.source} ({one_line_message(error)})")


def main() -> None:
    """Read the job, then send its items until the pipe is closed."""
    secure_output()
    # The parent's end closes the pipe, which ends this process; a group's SIGTERM must not end it before.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr  # output of libraries must not get into the stream of items
    job: Job = pickle.load(sys.stdin.buffer)
    try:
        try:
            for item in job.produce(*job.arguments):
                pickle.dump(item, out, protocol=pickle.HIGHEST_PROTOCOL)
                out.flush()
        except BrokenPipeError:
            raise
        except BaseException as error:  # a panic of a tokenizer (Rust) is no Exception
            pickle.dump(_error_to_send(error, job), out)
            out.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
