"""`minrnn eval` on tasks of Long Range Arena, and their place on the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minrnn.common.errors import UserError
from minrnn.data import build_task, model_vocab_size, open_data
from minrnn.data.lra import LabelledTask
from minrnn.evals.harness.command import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.classification import classifier_fields, new_model
from minrnn.pipeline.export import export_model, model_config
from minrnn.pipeline.loading import read_weights
from minrnn.pipeline.recipe import build_recipe, resolved_config

OPTIONS = {"min_length": 4, "max_length": 24, "max_depth": 4}
SIZES = {"train_examples": 4, "validation_examples": 2, "test_examples": 25}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a classifier of short ListOps."""
    folder = tmp_path_factory.mktemp("lra") / "run"
    data = {"corpus": "lra/listops", "task": {**OPTIONS, **SIZES}, "cache": str(folder.parent / "cache")}
    config = resolved_config(build_recipe({"data": data, "run": {"dir": str(folder)}}))
    task = build_task(data["corpus"], data["task"])
    assert isinstance(task, LabelledTask)
    tokenizer = task.tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 0}
    fields = {**sizes, **classifier_fields(data["corpus"], data["task"])}
    model = new_model("minrnn", model_config(fields, tokenizer, model_vocab_size(tokenizer)))
    export_model(model, tokenizer, folder / "model", config, tokens=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_classifier_is_scored_on_the_test_split(run: Path, tmp_path: Path, capsys):
    """The options are those of its run; the file has the format of lm-eval."""
    out = tmp_path / "results.json"
    main([str(run), "--tasks", "lra/listops", "--batch-size", "3", "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    task = build_task("lra/listops", {**OPTIONS, **SIZES})
    assert isinstance(task, LabelledTask)
    examples = open_data(task, run.parent / "cache").examples("test")
    model: Any = type(new_model("minrnn", MinRNNConfig(problem_type="single_label_classification")))
    model = model.from_pretrained(run / "model").eval()
    right = 0
    for number in range(len(examples)):
        ids = torch.from_numpy(examples.texts(number)[0].astype("int64"))[None]
        right += int(model(ids).logits.argmax()) == examples.label(number)
    values = result["results"]["lra/listops"]
    assert values["acc,none"] == pytest.approx(right / 25)
    assert result["n-samples"]["lra/listops"]["effective"] == 25
    assert result["higher_is_better"]["lra/listops"]["acc"]
    assert {"command", "commit", "machine", "config"} <= result.keys()
    assert "lra/listops" in capsys.readouterr().out


def errors(arguments: list[str]) -> str:
    with pytest.raises(UserError) as raised:
        main([*arguments, "--device", "cpu"])
    return str(raised.value)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ("lra/listops,hellaswag", "{}", "lra/listops is for a classifier and hellaswag for a language model"),
        ("lra/text", "{}", "--tasks: lra/text has 2 labels, but the model was made for 10"),
        ("lra/listop", "{}", "--tasks: there is no task lra/listop (did you mean lra/listops"),
        ("lra/listops", "{max_args: 1}", "--task-options: of lra/listops: max_args: must be at least 2"),
        (
            "lra/pathfinder",
            "{contour_length: 2}",
            "of lra/pathfinder: contour_length: must be 3 to 14, not 2",
        ),
    ],
)
def test_wrong_tasks_for_a_classifier(run: Path, tasks: str, options: str, message: str):
    assert message in errors([str(run), "--tasks", tasks, "--task-options", options])


def test_a_model_of_the_other_kind_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"MODEL: .* is a classifier, not a language model; minrnn eval"):
        read_weights(str(run))
    config = MinRNNConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=0)
    MinRNNForCausalLM(config).save_pretrained(tmp_path / "language-model")
    message = errors([str(tmp_path / "language-model"), "--tasks", "lra/listops"])
    assert "is a language model; tasks of Long Range Arena are for classifiers" in message
