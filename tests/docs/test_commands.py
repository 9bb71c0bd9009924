"""The commands of the documentation run: those of a page in its order, in one folder with small files.

Models are small, and runs have few steps. Commands that need more than a CPU and a minute are parsed only
(test_pages.py).
"""

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from pages import PAGES, REPOSITORY, Command, blocks, commands, text_of

from minrnn.data import is_task
from minrnn.launch.cli import main
from minrnn.pipeline.families.registry import OURS
from minrnn.pipeline.recipe import read_recipe

TASKS = REPOSITORY / "tests" / "evals" / "lm_eval_tasks"
SENTENCE = "The state of a lane goes on where it was cut, and no document ever sees another one.\n"
# Pages whose Python runs here, and the names that it uses.
PYTHON = {
    "README.md": (),
    "docs/long-documents.md": (),
    "docs/new-corpus.md": (),
    "docs/gpus.md": ("model", "input_ids"),
}
# Options that make a command short, by its words.
SHORT: dict[tuple[str, ...], dict[str, str]] = {
    ("generate",): {"--max-new-tokens": "3"},
    ("long-context",): {"--tokens": "600", "--anchors": "2", "--memory-tokens": "400", "--cuts": "128"},
    ("rolling",): {"--bytes": "2000"},
    ("tokenizer", "train"): {"--vocab-size": "300"},
    ("data", "show"): {"--seconds": "2"},
    ("data", "lra/listops"): {"--task": "{train_examples: 9, validation_examples: 3, test_examples: 3}"},
    ("sweep",): {"--tflops": "1"},
}
EXAMPLES = {"train_examples": 20, "validation_examples": 4, "test_examples": 4}
SMALL_RUN = {
    "train.sample_tokens": "2",
    "train.precision": "fp32",
    "data.workers": "0",
    "batch.lanes": "2",
    "tracking.uri": "null",
}
SMALL_MODEL = {"hidden_size": "16", "num_hidden_layers": "1", "intermediate_size": "24"}


def write_files(folder: Path) -> None:
    """The files that docs/README.md describes, small."""
    for name in ("one.txt", "input.txt", "book.txt"):
        (folder / name).write_text(SENTENCE * 400)
    for name in ("books/{}.txt", "notes/a/{}.md", "lib/sympy/polys/{}.py"):
        (folder / name).parent.mkdir(parents=True)
        for number in range(300):
            (folder / name.format(number)).write_text(f"Text {number}. {SENTENCE * 9}")
    rows = [
        json.dumps({"content": f"Row {number}. {SENTENCE}", "book_id": number // 20}) for number in range(300)
    ]
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (folder / "books.jsonl").write_text("\n".join(rows).replace('"content"', '"text"'))
    (folder / "my-tasks").mkdir()
    task = (TASKS / "tiny_choice.yaml").read_text().replace("tiny_choice", "my_task")
    (folder / "my-tasks" / "my_task.yaml").write_text(task)
    shutil.copyfile(TASKS / "questions.jsonl", folder / "questions.jsonl")
    (folder / "evals" / "results").mkdir(parents=True)
    for name in ("evals/results/quickstart.json", "results.json"):
        shutil.copyfile(REPOSITORY / "evals" / "results" / "bench-train-cpu.json", folder / name)
    (folder / "launch").symlink_to(REPOSITORY / "launch")


def short_train(words: list[str]) -> list[str]:
    """The words of a training, with a small model and few steps where they set nothing else."""
    given = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    recipe = read_recipe(words)
    small = dict(SMALL_RUN)
    if recipe.model.family == OURS and recipe.model.num_parameters is None:
        small |= {f"model.{name}": value for name, value in SMALL_MODEL.items()}
    if is_task(recipe.data.corpus):
        del small["train.sample_tokens"]
        if recipe.data.name.startswith("lra/"):
            small["data.task"] = yaml.safe_dump(
                {**EXAMPLES, **recipe.data.task}, default_flow_style=True
            ).strip()
            given.discard("data.task")
    else:
        small |= {"data.validation_tokens": "500", "batch.chunk": "32"}
        if recipe.data.corpus != "python-stdlib":
            small["data.validation_fraction"] = "0.1"
    # Later commands of a page may ask for more steps of the same run.
    steps = [index + 1 for index, word in enumerate(words) if word == "--train.steps"]
    short = [str(2 + int(word) // 500) if index in steps else word for index, word in enumerate(words)]
    small |= {} if steps else {"train.steps": "2"}
    added = [word for key, value in small.items() if key not in given for word in (f"--{key}", value)]
    return [*short, *added]


def run_here(words: list[str]) -> None:
    """Run `minrnn WORDS` in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(**({"reset_partial_state": True} if state is AcceleratorState else {}))
    with contextlib.suppress(SystemExit):
        main(words)
        return
    raise AssertionError(words)


def run(command: Command) -> None:
    """Run a command, made short."""
    words, recipe = command.words, command.recipe_words
    if words[:2] == ["minrnn", "train"] and recipe is not None:
        run_here(words[1:] if "--help" in words else ["train", *short_train(recipe)])
    elif words[0] == "minrnn":
        options = next((value for key, value in SHORT.items() if words[1:][: len(key)] == [*key]), {})
        words = list(words[1:])
        for option, value in options.items():
            if option in words:
                words[words.index(option) + 1] = value
            elif option != "--tflops" or "--plan" in words:
                words += [option, value]
        run_here(words)
    elif words[:2] == ["accelerate", "launch"]:
        assert recipe is not None
        start = len(words) - len(recipe)
        launch = [str(Path(sys.executable).with_name("accelerate")), *words[1:start], *short_train(recipe)]
        done = subprocess.run(
            launch, env=os.environ | command.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


def names_for(wanted: tuple[str, ...]) -> dict[str, Any]:
    """Values of names that a page's Python uses without making them."""
    from minrnn.models import MinRNNConfig, MinRNNForCausalLM

    model = MinRNNForCausalLM(MinRNNConfig(hidden_size=16, num_hidden_layers=1)).eval()
    return {name: {"model": model, "input_ids": torch.randint(256, (1, 9))}[name] for name in wanted}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/quickstart, after the README's `make train`."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--config", "quickstart", "--run.dir", str(folder / "quickstart")]
    run_here(["train", *short_train(words)])
    return folder / "quickstart"


def parts_in_order(page: str) -> list[Command | str]:
    """The commands and the Python blocks of a page, in its order."""
    python = blocks(page, "python") if page in PYTHON else []
    if not python:
        return [*commands(page)]
    before = len(re.findall(r"^```bash", text_of(page).partition("```python")[0], flags=re.MULTILINE))
    shell = commands(page)
    if page != "docs/new-corpus.md":
        return [*shell, *python]
    count = sum(len(command_lines(block)) for block in blocks(page, "bash")[:before])
    return [*shell[:count], *python, *shell[count:]]


def command_lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(
    page: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    write_files(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "quickstart")
    config = (tmp_path / "runs" / "quickstart" / "config.yaml").read_text()
    (tmp_path / "runs" / "quickstart" / "config.yaml").write_text(
        config.replace(str(trained), "runs/quickstart")
    )
    for name in ("my-export", "my-model"):
        if f"--out {name}" not in text_of(page):
            shutil.copytree(trained / "model", tmp_path / name)
    for recipe in blocks(page, "yaml"):
        name = re.match(r"# ([\w-]+\.yaml)\n", recipe)
        if name:
            (tmp_path / name[1]).write_text(recipe)
    for part in parts_in_order(page):
        if isinstance(part, str):
            exec(compile(part, page, "exec"), names_for(PYTHON[page]))
        elif not part.needs and part.words[0] not in ("make", "source", "pip"):
            run(part)
        capsys.readouterr()
