"""The process behind `loader.WorkerChunks`: `python -m minrnn.data.worker`, a job on standard input, pickled chunks on standard output."""

import os
import pickle
import signal
import sys

from .errors import UserError
from .loader import DirectChunks
from .output import secure_output


def main() -> None:
    """Read the job, then send chunks until nobody listens."""
    secure_output()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever ends the parent ends this process, by closing the pipe
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr  # a library that prints must not write into the stream
    job = pickle.load(sys.stdin.buffer)
    try:
        try:
            for chunk in DirectChunks(*job):
                pickle.dump(chunk, out, protocol=pickle.HIGHEST_PROTOCOL)
                out.flush()
        except UserError as error:
            pickle.dump(error, out)
            out.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
