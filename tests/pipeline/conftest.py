"""Fixtures: a run that trains in a second, in this process."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from local_hub import LocalHub
from push_helpers import use_hub
from run_helpers import Values, train

from minrnn.pipeline import tracking
from minrnn.pipeline.tracking_store import prepare_sqlite

SENTENCE = "the state of a lane goes on where it was cut and no document ever sees another one"
WORDS = SENTENCE.split()


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: with tensors this small, two threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 300 documents of very different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    with path.open("w") as file:
        for _ in range(300):
            text = " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 3, 10, 60])))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def values(tmp_path: Path, corpus: Path) -> Values:
    """A tiny recipe, which tests may change."""
    return {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.1},
        "data": {
            "corpus": str(corpus),
            "validation_fraction": 0.1,
            "validation_tokens": 500,
            "shuffle_window": 50,
            "workers": 0,
        },
        "batch": {"readers": 2, "lanes": 2, "chunk": 24},
        "optim": {"warmup_steps": 2},
        "train": {
            "precision": "fp32",
            "steps": 12,
            "log_every": 1,
            "eval_every": 6,
            "save_every": 4,
            "sample_tokens": 3,
        },
        "tracking": {"uri": None},
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """An empty hub, used by this process."""
    with LocalHub() as hub:
        use_hub(hub, monkeypatch, tmp_path)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def run_recipe() -> Callable[[Values], Path]:
    """Train a recipe in this process; returns the run's folder."""
    return train


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database after its first start, which takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    prepare_sqlite(path)
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path, monkeypatch) -> str:
    """The URI of a database of this test; artifacts go below the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def an_answer_may_take_long(monkeypatch):
    """Allows slow answers, on a busy machine, in tests that are not about closing."""
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 60.0)
