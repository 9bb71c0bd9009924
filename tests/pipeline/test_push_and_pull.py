"""A model that was pushed works on another machine, and a push that is killed leaves the repository whole."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from local_hub import LocalHub
from run_helpers import Values

from minrnn.pipeline.push.commit import push_run
from minrnn.pipeline.push.target import MARKER, PushOptions

Run = Callable[[Values], Path]
OPTIONS = PushOptions("me/model")
PULL = """
import sys

sys.modules["minrnn"] = None  # importing it fails, as where it is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/model", trust_remote_code=True)
inputs = tokenizer("the state", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]))
"""
pytestmark = pytest.mark.slow


def is_whole(files: dict[str, bytes]) -> bool:
    """Whether these are all files of one push, unchanged."""
    written = json.loads(files[MARKER])["files"]
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items() if path != MARKER}
    return hashes == written


def push_and_kill(run: Path, hub: LocalHub, at: int) -> int:
    """Push in a process that is killed at its request number `at`; returns the process's status."""
    huggingface_hub.close_session()
    first = len(hub.requests)
    child = os.fork()
    if child == 0:
        try:
            push_run(run, OPTIONS)
            os._exit(0)
        finally:  # after an error
            os._exit(2)

    def kill(method: str, path: str) -> int | None:
        if len(hub.requests) > first + at:
            os.kill(child, signal.SIGKILL)
            return 0
        return None

    hub.fault = kill
    _, status = os.waitpid(child, 0)
    hub.fault = lambda method, path: None
    return os.waitstatus_to_exitcode(status)


def test_a_push_that_is_killed_leaves_the_repository_whole(values: Values, run_recipe: Run, hub: LocalHub):
    """At five random requests, on a repository that holds an older push, and on a new one."""
    run = run_recipe(values)
    for step in (8, None):
        for at in random.Random(0).sample(range(8), 5):
            if step is not None:
                hub.repositories.clear()
                push_run(run, OPTIONS, step=step)
            before = hub.files("me/model") if hub.repositories else {}
            killed = push_and_kill(run, hub, at)
            files = hub.files("me/model") if hub.repositories else {}
            assert killed in (-signal.SIGKILL, 0)
            assert files == before or is_whole(files)
            assert files == before or killed == 0
            push_run(run, OPTIONS)
            files = hub.files("me/model")
            assert is_whole(files)
            assert json.loads(files[MARKER])["step"] == 12
            if step is None:
                hub.repositories.clear()


def test_a_pushed_model_runs_without_minrnn_and_in_its_commands(
    values: Values, run_recipe: Run, hub: LocalHub, tmp_path: Path
):
    push_run(run_recipe(values), OPTIONS)
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **hub.environment(), **cache}
    outputs = []
    words = ["generate", "me/model", "--prompt", "the state", "--max-new-tokens", "5", "--temperature", "0"]
    for command in (["-c", PULL], ["-m", "minrnn.launch.cli", *words]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.strip())
    assert outputs[0].startswith(("the state", "<bos>the state"))
    assert outputs[1].removeprefix("<bos>") == outputs[0].removeprefix("<bos>").removesuffix("<eos>")
