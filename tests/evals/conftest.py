"""Fixtures: an export to evaluate, and the folder of the tasks' files."""

import json
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from lm_eval_helpers import TASKS, TOKENIZER
from mlflow import MlflowClient

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.export import export_model
from minrnn.pipeline.recipe import build_recipe, resolved_config


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with untied embeddings, in the folder of a run with tracking."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "tie_word_embeddings": False}
    tokens = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=264, **sizes, **tokens))
    export_model(model, TOKENIZER, run / "model", resolved_config(build_recipe({})), tokens=0)
    uri = f"sqlite:///{run / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    run_id = client.create_run(client.create_experiment("tests")).info.run_id
    (run / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": run_id}))
    (run / "config.yaml").write_text("")
    (run / ".finished").write_text("12")
    return run / "model"


@pytest.fixture
def relative_task_files(tmp_path: Path, monkeypatch):
    """The tasks name their files relative to their own folder."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
