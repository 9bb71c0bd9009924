"""Recipes, read from a file and a command line. All errors are reported at once."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minrnn.common.errors import UserError
from minrnn.data import source_specs
from minrnn.models import MinRNNConfig
from minrnn.pipeline.config import SECTIONS
from minrnn.pipeline.corpora import corpus_spec
from minrnn.pipeline.families.registry import TOKENIZER_FIELDS
from minrnn.pipeline.model_section import NO_CONFIG_FIELDS, ModelSection
from minrnn.pipeline.recipe import (
    build_recipe,
    help_text,
    read_recipe,
    resolved_config,
)
from minrnn.pipeline.section import docstring_of


def errors(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as raised:
        read_recipe(argv)
    return str(raised.value).splitlines()


def test_all_errors_are_reported_with_their_keys(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "batch: {lanes: many, chunk: -3}\nmodle: {cell: mingru}\nmodel: {cell: gru, dropout: 2.0}\noptim: "
        "{lrr: 1}\n"
    )
    lines = errors(["--config", str(path), "--train.precison", "bf16", "--train.steps=0", "--lanes", "3"])
    assert len(lines) == 9
    assert all(line.startswith("error: ") for line in lines)
    text = "\n".join(lines)
    for expected in (
        "error: batch.lanes: input should be a valid integer, unable to parse string as an integer, not "
        "'many'",
        "error: batch.chunk: input should be greater than or equal to 1, not -3",
        "error: modle: unknown section (did you mean model?)",
        "error: model.cell: 'gru' is none of mingru, minlstm, mingru_signed, minlstm_signed",
        "error: model.dropout: must be in [0, 1), not 2.0",
        "error: optim.lrr: unknown key (did you mean optim.lr?)",
        "error: train.precison: unknown key (did you mean train.precision?)",
        "error: train.steps: input should be greater than or equal to 1, not 0",
        "error: lanes: unknown key (did you mean batch.lanes?)",
    ):
        assert expected in text


def test_fields_that_the_cell_does_not_read_are_errors():
    """The defaults, which config.yaml holds, are not."""
    options = ["--model.cell", "hgrn", "--model.head_dim", "null", "--model.candidate_activation", "none"]
    assert read_recipe(options).model.cell == "hgrn"
    assert errors(["--model.cell", "hgrn", "--model.head_dim", "64", "--model.state_expansion", "8"]) == [
        "error: model.head_dim: is for linear_attention, hgrn2, mlstm, gla, and not for hgrn: leave it out",
        "error: model.state_expansion: is for s4d, linear_attention, hgrn2, mlstm, gla, and not for hgrn: "
        "leave it out",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must hold sections"),
        ("a: [", "is not YAML"),
        ("run: 3", "run: input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert message in "\n".join(errors(["--config", str(path)]))


def test_a_missing_recipe_lists_the_available_ones():
    (line,) = errors(["--config", "quickstrat"])
    assert line.startswith("error: --config: cannot read quickstrat")
    assert "quickstart" in line.split("come with minrnn")[1]


def test_words_that_are_not_settings_are_errors():
    assert errors(["foo", "--train.steps"]) == [
        "error: foo: is no option; settings are written --section.field VALUE",
        "error: train.steps: lacks a value",
    ]


def test_the_command_line_overrides_the_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim: {lr: 1.0e-2, clip: 3}\n")
    recipe = read_recipe(
        [
            "--config",
            str(path),
            "--optim.lr",
            "1e-3",
            "--data.subset=null",
            "--run.change",
            "[optim.lr]",
            "--train.prompts",
            "[a]",
        ]
    )
    assert (recipe.optim.lr, recipe.optim.clip, recipe.run.change, recipe.train.prompts) == (
        1e-3,
        3.0,
        ["optim.lr"],
        ["a"],
    )


@pytest.mark.parametrize(
    "typed",
    [
        "a #b",
        "123",
        "'q'",
        '"q"',
        " lead",
        "trail ",
        "null",
        "2024-01-01",
        "yes",
        "1e3",
        "0x10",
        "1:30",
        "*.txt",
        "{a: b}",
        "[a]",
        "~",
        "- x",
    ],
)
def test_text_is_taken_literally(typed: str):
    """In settings of type str, in optional ones except for the word null, and in lists."""
    recipe = read_recipe(
        [
            "--run.dir",
            typed,
            f"--data.corpus={typed}",
            "--data.join",
            typed,
            "--train.prompts",
            json.dumps([typed, "b"]),
        ]
    )
    assert (recipe.run.dir, recipe.data.corpus) == (os.path.expanduser(typed), typed)
    assert recipe.data.join == (None if typed == "null" else typed)
    assert recipe.train.prompts == [typed, "b"]


def test_other_values_are_converted_to_their_type():
    typed = {
        "train.steps": ("1e3", 1000),
        "data.validation_tokens": ("null", None),
        "optim.clip": ("None", None),
        "optim.lr": ("1e-3", 1e-3),
        "model.dropout": (".5", 0.5),
        "data.skip_broken": ("yes", True),
        "batch.carry_state": ("false", False),
        "train.recompute": ("none", "none"),
        "model.scan_backend": ("null", None),
        "run.change": ("[optim.lr, optim.clip]", ["optim.lr", "optim.clip"]),
        "train.prompts": ("[123, null, yes, 2024-01-01, 1e3]", ["123", "null", "yes", "2024-01-01", "1e3"]),
    }
    recipe = read_recipe([f"--{key}={text}" for key, (text, _) in typed.items()])
    for key, (_, value) in typed.items():
        section, name = key.split(".")
        assert getattr(getattr(recipe, section), name) == value, key
    task = read_recipe(
        ["--data.corpus=synthetic/mqar", "--data.task={vocab_size: 8192, power: 0.1}", "--batch.chunk=512"]
    ).data.task
    assert task == {"vocab_size": 8192, "power": 0.1}


def test_values_of_the_wrong_type_are_refused():
    lines = errors(
        [
            "--train.steps",
            "2024-01-01",
            "--optim.lr",
            "null",
            "--train.prompts",
            "def ",
            "--run.change",
            "[a",
            "--run.seed",
            "true",
        ]
    )
    for expected in (
        "train.steps: input should be a valid integer",
        "optim.lr: input should be a valid number",
        "train.prompts: input should be a valid list",
        "run.change: input should be a valid list",
        "run.seed: input should be a valid integer",
    ):
        assert sum(line.startswith(f"error: {expected}") for line in lines) == 1
    assert len(lines) == 5


def test_text_with_a_nul_is_refused():
    r"""Only a file can contain one: `"a\0b"` in YAML."""
    with pytest.raises(UserError) as caught:
        build_recipe({"run": {"dir": "a\0b"}, "data": {"corpus": "x\0", "join": "\0"}})
    assert [key for key, _ in caught.value.errors] == ["run.dir", "data.corpus", "data.join"]
    assert all("no NUL character" in problem for _, problem in caught.value.errors)


def test_a_setting_is_not_the_value_of_another():
    lines = errors(["--run.dir", "--train.steps", "3", "--data.corpus"])
    assert lines == [
        "error: run.dir: lacks a value (if --train.steps is meant to be it: --run.dir=--train.steps)",
        "error: data.corpus: lacks a value",
    ]


def test_join():
    assert build_recipe({"data": {"join": "package"}}).data.join == "package"
    (spec,) = source_specs(corpus_spec(build_recipe({"data": {"join": "book_id"}})))
    assert spec.join == "book_id"
    (line,) = errors(["--data.join", "folder", "--data.order", "windows"])
    assert line.startswith("error: data.join: is for data.order documents")


def test_presets_set_fields_that_the_user_did_not():
    recipe = read_recipe(["--model.preset", "paper", "--model.hidden_act", "relu"])
    fields = recipe.resolved_model_fields()
    assert (fields["candidate_activation"], fields["output_gate"], fields["hidden_act"]) == (
        "g",
        False,
        "relu",
    )


def test_a_resolved_recipe_reads_back_unchanged():
    recipe = read_recipe(["--model.preset", "paper", "--model.dropout", "0.1"])
    again = build_recipe(yaml.safe_load(yaml.safe_dump(resolved_config(recipe))))
    assert resolved_config(again) == resolved_config(recipe)


@pytest.mark.slow
def test_help_is_the_same_without_docstrings():
    code = "from minrnn.pipeline.recipe import help_text; print(help_text())"
    output = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.endswith(help_text() + "\n")


def test_help_describes_every_setting():
    text = help_text()
    for section, cls in SECTIONS.items():
        for name, field in cls.model_fields.items():
            assert f"--{section}.{name} " in text
            assert field.description, f"{section}.{name} lacks a docstring"


def test_the_model_section_is_minrnn_config():
    """The same fields in the same order, with the same types, defaults and descriptions."""
    arguments = inspect.cleandoc(MinRNNConfig.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", arguments, flags=re.MULTILINE | re.DOTALL)
    documented = {name: " ".join(text.split()) for name, text in entries}
    fields = {
        name: (annotation, getattr(MinRNNConfig, name), documented[name])
        for name, annotation in MinRNNConfig.__annotations__.items()
        if name in documented and name not in (*TOKENIZER_FIELDS, "num_towers")
    }
    section = {
        name: (field.annotation, field.default, " ".join((field.description or "").split()))
        for name, field in ModelSection.model_fields.items()
        if name not in NO_CONFIG_FIELDS
    }
    assert list(section.items()) == list(fields.items())


def test_run_change_refuses_settings_that_can_never_change():
    (line,) = errors(["--run.change", "[model.hidden_size]"])
    assert "model.hidden_size cannot change within a run" in line


@pytest.mark.parametrize(
    ("typed", "environment", "expected"),
    [
        ([], None, "sqlite:///mlflow.db"),
        ([], "", "sqlite:///mlflow.db"),
        ([], "http://mlflow:5000", "http://mlflow:5000"),
        (["--tracking.uri", "sqlite:///own.db"], "http://mlflow:5000", "sqlite:///own.db"),
        (["--tracking.uri", "null"], "http://mlflow:5000", None),
    ],
)
def test_the_environment_sets_the_tracking_uri_if_the_recipe_does_not(
    typed: list[str], environment: str | None, expected: str | None, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if environment is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    recipe = read_recipe(typed)
    assert recipe.tracking.resolved_uri() == expected
    again = build_recipe(yaml.safe_load(yaml.safe_dump(resolved_config(recipe))))
    assert again.tracking.uri == recipe.tracking.uri, (
        "what config.yaml says means the same wherever it is used"
    )


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "me:secret@mlflow:5000", "mlruns", "./mlruns", "file:///tmp/x", "sqlite://a.db"]
)
def test_a_tracking_uri_that_mlflow_cannot_open_is_an_error_before_training(uri: str, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    (typed,) = errors(["--tracking.uri", uri])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (inherited,) = errors([])
    for line in (typed, inherited):
        assert line.startswith("error: tracking.uri: ")
        assert "write sqlite:///FILE" in line
        assert "secret" not in line
    assert "MLFLOW_TRACKING_URI" in inherited


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///:memory:",
        "sqlite+pysqlite:////a/b.db?x=1",
        "postgresql://me:x@db/m",
        "databricks",
        "azureml://a",
    ],
)
def test_tracking_uris_of_servers_and_databases_are_taken(uri: str):
    assert read_recipe(["--tracking.uri", uri]).tracking.uri == uri


def test_folders_are_taken_if_mlflow_may_write_to_them(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert read_recipe(["--tracking.uri", "mlruns"]).tracking.uri == "mlruns"


def test_a_corpus_excludes_the_files_of_the_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = corpus_spec(
        read_recipe(["--run.dir", "runs/x", "--tracking.uri", "sqlite:///db/mlflow.db?timeout=9"])
    )
    excluded = source_specs(spec)[0].excluded
    expected = {
        "runs/x",
        "runs/x/metrics.jsonl",
        "runs/x/model",
        "mlruns",
        "db/mlflow.db",
        "db/mlflow.db-journal",
    }
    assert expected <= {str(Path(path).relative_to(tmp_path.resolve())) for path in excluded}


def test_docstrings_are_read_as_python_3_13_keeps_them():
    """Python 3.13 and later store them without indentation, older versions as written."""
    assert MinRNNConfig.__doc__ is not None
    assert docstring_of(MinRNNConfig) == inspect.cleandoc(MinRNNConfig.__doc__)
