"""`minrnn eval` on tasks of Long Range Arena, and their place on the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

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
        (
            "lra/text",
            "{}",
            "lra/text is not the task of the model: its labels are negative, positive, the model's 0, 1",
        ),
        (
            "lra/image",
            "{}",
            "lra/image is not the task of the model: its rows of the embedding are 264",
        ),
        ("lra/listop", "{}", "--tasks: there is no task lra/listop (did you mean lra/listops"),
        ("lra/listops", "{max_args: 1}", "--task-options: of lra/listops: max_args: must be at least 2"),
        (
            "lra/pathfinder",
            "{contour_length: 2}",
            "of lra/pathfinder: contour_length: must be 3 to 14, not 2",
        ),
        (
            "lra/pathfinder",
            "{contour_length: 1, distractor_dashes: 0}",
            "of lra/pathfinder: contour_length: must be 2 to 14, not 1",
        ),
        (
            "lra/pathfinder",
            "{distractor_dashes: 21}",
            "of lra/pathfinder: distractor_dashes: must be 0 to 20, not 21",
        ),
    ],
)
def test_wrong_tasks_for_a_classifier(run: Path, tasks: str, options: str, message: str):
    assert message in errors([str(run), "--tasks", tasks, "--task-options", options])


@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        ("lra/listops", ["--num-fewshot", "2", "--rolling-window", "64", "--bootstrap-iters", "9"]),
        ("hellaswag", ["--task-options", "{max_args: 3}"]),
    ],
)
def test_options_of_the_other_kind_of_task_are_refused(run: Path, tasks: str, options: list[str]):
    lines = errors([str(run), "--tasks", tasks, *options]).splitlines()
    kind = "tasks of lm-eval" if tasks.startswith("lra/") else "tasks of Long Range Arena (lra/NAME)"
    assert lines == [f"error: {option}: is for {kind}; leave it out" for option in options[::2]]


def without_head(weights: dict[str, torch.Tensor]) -> None:
    del weights["score.weight"]


def with_another_head(weights: dict[str, torch.Tensor]) -> None:
    weights["score.bias"] = torch.zeros(10)


def with_a_wider_head(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = torch.zeros(11, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "was exported by another version of minrnn (missing score.weight)"),
        (with_another_head, "was exported by another version of minrnn (unexpected score.bias)"),
        (with_a_wider_head, "cannot load"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run: Path, tmp_path: Path, change: Any, message: str):
    model = shutil.copytree(run / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert message in errors([str(model), "--tasks", "lra/listops"])


def test_a_model_of_the_other_kind_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"MODEL: .* is a classifier, not a language model; minrnn eval"):
        read_weights(str(run))
    with pytest.raises(UserError, match=r"model\.init_from: .*; a run starts from the weights of a lang"):
        read_weights(str(run), key="model.init_from")
    config = MinRNNConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=0)
    MinRNNForCausalLM(config).save_pretrained(tmp_path / "language-model")
    message = errors([str(tmp_path / "language-model"), "--tasks", "lra/listops"])
    assert "is a language model; tasks of Long Range Arena are for classifiers" in message
