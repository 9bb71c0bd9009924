"""Ctrl-C and a closed pipe end every command without a traceback. `~` is the home folder in every path that a
user gives."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minrnn.common.errors import UserError
from minrnn.data import BYTES, CorpusSpec, byte_tokenizer, open_source
from minrnn.data.sources import Position
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.export import export_model
from minrnn.pipeline.recipe import build_recipe, parse_arguments, read_recipe, resolved_config
from minrnn.pipeline.tracking_store import absolute_uri


def run(arguments: list[str], expected_lines: int = 0, stderr_too: bool = False) -> tuple[int, str]:
    """Status and stderr (or the lines read from it) of a command whose reader closes after some lines."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if stderr_too else subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    read = [process.stdout.readline() for _ in range(expected_lines)]
    process.stdout.close()
    stderr = "".join(read) if process.stderr is None else process.stderr.read()
    return process.wait(), stderr


def script(body: str) -> list[str]:
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    return [
        "-c",
        "import os, sys\nfrom minrnn.common.output import conventional_exit\nwith "
        f"conventional_exit():\n{indented}",
    ]


BODIES = {
    "a long text": "for i in range(100_000): print(i)",
    "a text that fits into the buffer": "input_ = os.read(0, 1); print('one')",
    "help": "os.read(0, 1); print('usage'); raise SystemExit(0)",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_closed_pipe_ends_with_status_141_and_no_message(body: str):
    process = subprocess.Popen(
        [sys.executable, *script(BODIES[body])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()  # from here on it writes
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_other_broken_pipes_are_still_errors():
    ended = subprocess.run(
        [sys.executable, *script("a, b = os.pipe(); os.close(a); os.write(b, b'x')")],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "BrokenPipeError" in ended.stderr


def test_ctrl_c_ends_with_status_130_and_no_message():
    process = subprocess.Popen(
        [sys.executable, *script("import time; print('ready', flush=True); time.sleep(600)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


@pytest.fixture
def export(home: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = MinRNNConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=0, bos_token_id=tokenizer.bos_token_id
    )
    export_model(
        MinRNNForCausalLM(config), tokenizer, home / "model", resolved_config(build_recipe({})), tokens=0
    )
    return home / "model"


def test_home_in_a_recipe(home: Path):
    (home / "recipe.yaml").write_text(
        "run: {dir: ~/runs/x}\nmodel: {init_from: ~/model}\ndata: {tokenizer: ~/words}\n"
    )
    assert parse_arguments(["--config=~/recipe.yaml"])[0] == "~/recipe.yaml"
    recipe = read_recipe(["--config=~/recipe.yaml"])
    assert recipe.run.dir == f"{home}/runs/x"
    assert recipe.data.tokenizer == f"{home}/words"
    assert recipe.model.init_from == f"{home}/model"
    assert (
        read_recipe(["--run.dir=~/runs/y"]).run.dir
        == resolved_config(read_recipe(["--run.dir=~/runs/y"]))["run"]["dir"]
        == f"{home}/runs/y"
    )
    assert read_recipe([]).data.tokenizer == BYTES


def test_home_in_a_corpus(home: Path):
    (home / "a.txt").write_text("one")
    for name in ("~/a.txt", "~/*.txt"):
        assert [record.text for record in open_source(CorpusSpec(name)).read(0, Position())] == ["one"]
    with pytest.raises(UserError, match=r"no file, folder or match for ~nobody-of-that-name/a\.txt"):
        open_source(CorpusSpec("~nobody-of-that-name/a.txt"))


def test_home_in_the_tracking_uri(home: Path):
    assert absolute_uri("sqlite:///~/mlflow.db") == f"sqlite:///{home}/mlflow.db"


def test_home_in_the_arguments_of_commands(home: Path, export: Path, capsys: pytest.CaptureFixture[str]):
    (home / "prompt.txt").write_text("a prompt ~")
    main(["generate", "~/model", "--prompt-file=~/prompt.txt", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.startswith("a prompt ~")
    main(["report", "--out=~/page"])
    assert (home / "page" / "report.md").exists()
    with pytest.raises(SystemExit):
        main(["export", "~/runs/none", "--out", "~/x"])
    assert f"there is no folder {home}/runs/none;" in capsys.readouterr().err
    assert not list((home / "work").iterdir()), "nothing is made in a folder named ~"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["bench", "train", "--help"],
        ["report"],
        ["plan", "--config", "quickstart", "--processes", "1"],
    ],
)
def test_commands_whose_reader_has_closed(arguments: list[str], home: Path):
    status, stderr = run(["-m", "minrnn.launch.cli", *arguments])
    assert status in (0, 141)
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr


@pytest.mark.slow
def test_generation_whose_reader_has_closed(home: Path, export: Path):
    status, stderr = run(
        ["-m", "minrnn.launch.cli", "generate", "~/model", "--prompt", "a\nb", "--max-new-tokens", "100000"],
        expected_lines=1,
    )
    assert status == 141
    assert stderr == ""


def test_a_tilde_in_a_prompt_is_text(home: Path):
    """A prompt is text."""
    assert read_recipe(["--train.prompts", "['~/x']"]).train.prompts == ["~/x"]
