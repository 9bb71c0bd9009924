"""Tasks of Long Range Arena in the training loop: scores, resume, export, processes, errors."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Values, losses, recipe_file, stop_at_step_7
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from minrnn.common.errors import UserError
from minrnn.data import cache_folder, model_vocab_size, open_data
from minrnn.data.lra import LRA_TASKS, GeneratedTask, ListOps
from minrnn.models import MinRNNForSequenceClassification
from minrnn.pipeline.classification import classifier_fields, new_model, open_labelled
from minrnn.pipeline.export import export_run, model_config
from minrnn.pipeline.recipe import build_recipe, read_recipe

Run = Callable[[Values], Path]
SIZES = {"train_examples": 40, "validation_examples": 7, "test_examples": 9}
TASK: dict[str, Any] = {**SIZES, "min_length": 4, "max_length": 24, "max_depth": 4}


@pytest.fixture
def task_values(values: Values, tmp_path: Path) -> Values:
    """A tiny run on short ListOps."""
    values["data"] = {"corpus": "lra/listops", "task": TASK, "cache": str(tmp_path / "cache"), "workers": 0}
    del values["batch"]["chunk"], values["train"]["sample_tokens"]
    values["model"] |= {"pooling": "mean", "bidirectional": True}
    return values


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == kind]


def test_a_run_scores_validation_and_test(task_values: Values, run_recipe: Run):
    """Accuracy and loss are those of the exported model on one example at a time, and each split is read
    once."""
    folder = run_recipe(task_values)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert isinstance(model, MinRNNForSequenceClassification)
    data = open_data(ListOps(**TASK), cache_folder(task_values["data"]["cache"]))
    for split in ("validation", "test"):
        examples = data.examples(split)
        right, nats = 0, 0.0
        for number in range(len(examples)):
            (tokens,), label = examples.texts(number), examples.label(number)
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens.astype("int64"))[None]).logits[0].double()
            right += int(logits.argmax()) == label
            nats -= logits.log_softmax(0)[label].item()
        entry = entries(folder, split)[-1]
        assert entry["examples"] == len(examples) == SIZES[f"{split}_examples"]
        assert entry["accuracy"] == pytest.approx(right / len(examples))
        assert entry["loss"] == pytest.approx(nats / len(examples), rel=1e-5)
        assert entry["chance"] == 0.1
    assert [entry["step"] for entry in entries(folder, "validation")] == [6, 12]
    assert [entry["step"] for entry in entries(folder, "test")] == [12]
    assert (folder / "loss.png").exists()
    assert not (folder / "samples.txt").exists()


def test_tokens_are_counted_without_padding(task_values: Values, run_recipe: Run):
    folder = run_recipe(task_values)
    examples = open_data(ListOps(**TASK), cache_folder(task_values["data"]["cache"])).examples("train")
    epoch = sum(len(examples.texts(number)[0]) for number in range(len(examples)))
    # 12 steps of 2 readers with 2 lanes are 48 of 40 examples; 10 steps are one epoch.
    counted = {entry["step"]: entry["tokens"] for entry in entries(folder, "train")}
    assert counted[10] == epoch
    assert counted[12] > epoch


def test_a_resumed_run_is_the_undisturbed_one(task_values: Values, run_recipe: Run, tmp_path, monkeypatch):
    task_values["data"]["workers"] = 1
    undisturbed = run_recipe(task_values)
    task_values["run"]["dir"] = str(tmp_path / "stopped")
    stop_at_step_7(task_values, run_recipe, monkeypatch)
    resumed = run_recipe(task_values)
    assert losses(resumed) == losses(undisturbed)
    for kind in ("validation", "test"):
        assert entries(resumed, kind) == entries(undisturbed, kind)


def test_the_number_of_workers_does_not_matter(task_values: Values, run_recipe: Run, tmp_path):
    first = run_recipe(task_values)
    task_values["data"]["workers"] = 2
    task_values["run"]["dir"] = str(tmp_path / "workers")
    assert losses(run_recipe(task_values)) == losses(first)


def test_a_lost_test_is_made_up_for(task_values: Values, run_recipe: Run):
    """A run that was killed between its last save and the test scores it at the next start."""
    folder = run_recipe(task_values)
    expected = entries(folder, "test")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"test"' not in line))
    (folder / ".finished").unlink()
    run_recipe(task_values)
    assert entries(folder, "test") == expected


def test_a_run_refuses_other_examples(task_values: Values, run_recipe: Run, monkeypatch):
    with monkeypatch.context() as patched:
        task_values["data"]["workers"] = 0
        stop_at_step_7(task_values, run_recipe, patched)
    cache = Path(task_values["data"]["cache"])
    manifest = next(cache.glob("lra/listops-*/manifest.json"))
    values = json.loads(manifest.read_text())
    values["files"]["labels-train.npy"][1] = "other"
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"data\.corpus: the examples of lra/listops are not those"):
        run_recipe(task_values)


def test_the_export_classifies_text(task_values: Values, run_recipe: Run, tmp_path: Path):
    folder = run_recipe(task_values)
    export_run(folder, tmp_path / "out")
    for path in (folder / "model", tmp_path / "out"):
        card = (path / "README.md").read_text()
        assert "pipeline_tag: text-classification" in card
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        assert tokenizer("[MAX 2 9 ]").input_ids == [11, 2, 9, 14]
        model = AutoModelForSequenceClassification.from_pretrained(path)
        classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        assert classify("[MAX 2 9 ]")[0]["label"] in map(str, range(10))
        assert model.config.num_labels == 10


def test_a_classifier_begins_with_a_language_models_weights(values: Values, run_recipe: Run, tmp_path):
    """Of the same vocabulary: bytes. A bound of its logits is the head's, which stays behind."""
    values["model"]["logit_softcap"] = 15
    language_model = run_recipe(values)
    del values["model"]["logit_softcap"]
    folder = tmp_path / "imdb"
    write_reviews(folder)
    values["run"]["dir"] = str(tmp_path / "classifier")
    values["model"] |= {"init_from": str(language_model)}
    task = {"folder": str(folder), "max_length": 24}
    values["data"] = {"corpus": "lra/text", "task": task, "cache": str(tmp_path / "cache"), "workers": 0}
    values["train"] |= {"steps": 1, "sample_tokens": 0}
    assert entries(run_recipe(values), "test")[0]["chance"] == 0.5
    values["model"] |= {"bidirectional": True}
    values["run"]["dir"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.bidirectional: is True, but .* has False"):
        run_recipe(values)


def write_reviews(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    texts, labels = [f"a {word} film" for word in ("bad", "good", "long", "short")] * 3, [0, 1, 0, 1] * 3
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}-00000.parquet")


def write_data(name: str, folder: Path) -> dict[str, Any]:
    """Tiny files of a task's schema; the options to read them with."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    if name == "text":
        write_reviews(folder)
    elif name == "image":
        folder.mkdir()
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (9, 99, 199)).save(buffer, "PNG")
        images = [{"bytes": buffer.getvalue(), "path": None}] * 80
        for split in ("train", "test"):
            pq.write_table(pa.table({"img": images, "label": [1] * 80}), folder / f"{split}.parquet")
    elif name == "retrieval":
        folder.mkdir()
        for split in ("train", "eval", "test"):
            (folder / f"new_aan_pairs.{split}.tsv").write_text("1.0\t1\t2\ta text\tanother\n" * 80)
    else:
        return {"train_examples": 80, "validation_examples": 2, "test_examples": 2}
    return {"folder": str(folder), "validation_examples": 2}


@pytest.mark.parametrize("name", sorted(LRA_TASKS))
def test_each_recipe_reads_a_batch(name: str, tmp_path: Path, monkeypatch):
    """At its published lengths, from tiny files; its model on the meta device takes the batch."""
    if issubclass(LRA_TASKS[name], GeneratedTask):
        monkeypatch.setattr(LRA_TASKS[name], "BLOCK", 20)
    recipe = read_recipe(["--config", f"lra-{name}", "--data.cache", str(tmp_path)])
    options = {**recipe.data.task, **write_data(name, tmp_path / "files")}
    recipe = dataclasses.replace(recipe, data=recipe.data.model_copy(update={"task": options}))
    data = open_labelled(recipe)
    assert data is not None
    assert data.task.length <= recipe.batch.chunk
    batch = data.open_reader(0, 1, recipe.batch.lanes, 0, None).next_chunk()
    assert batch.num_scored == recipe.batch.lanes
    assert batch.input_ids.max() <= data.task.pad
    fields = {**recipe.resolved_model_fields(), **classifier_fields(recipe.data.corpus, options)}
    tokenizer = data.task.tokenizer()
    config = model_config({**fields, "num_hidden_layers": 1}, tokenizer, model_vocab_size(tokenizer))
    with torch.device("meta"):
        model = new_model("minrnn", config)
    inputs = {key: torch.from_numpy(value).to("meta") for key, value in batch.model_inputs().items()}
    assert model(**inputs, use_cache=False).logits.shape == (recipe.batch.lanes, data.task.num_labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.prompts": ["a"]},
            "train.prompts: is for samples of text, and lra/listops has none; leave it",
        ),
        ({"train.sample_tokens": 7}, "train.sample_tokens: is for samples of text, and lra/listops has none"),
        ({"data.task": {"max_lenght": 3}}, "unknown option max_lenght (did you mean max_length"),
        ({"data.corpus": "lra/listop"}, "there is no task lra/listop (did you mean lra/listops"),
        (
            {"batch.chunk": 22},
            "22 does not hold the longest sequence of lra/listops: set it to 23",
        ),
        ({"data.tokenizer": "gpt2"}, "data.tokenizer: is for text; lra/listops has its own examples"),
        ({"parallel.context": 2}, "parallel.context: cannot divide the examples of lra/listops"),
        ({"model.family": "llama"}, "model.family: lra/listops is for minrnn's classifier, not for llama"),
        ({"batch.readers": 41}, "batch.readers: 41 readers cannot share 40 training examples"),
        ({"data.corpus": "python-stdlib", "data.task": {}}, "model.bidirectional: is for classifiers"),
        (
            {"data.task": {"min_length": 900, "max_depth": 3}},
            "no expression of this depth has more",
        ),
        ({"data.task": {"test_examples": 0}}, "test_examples: must be at least 1, not 0"),
        (
            {"data.task": {"folder": "files", "max_depth": 4, "data_seed": 1}},
            "data_seed: is for generated examples, not for those of folder; leave it out; max_depth: is",
        ),
        ({"model.tie_word_embeddings": False}, "model.tie_word_embeddings: is for the head of a language m"),
        ({"batch.carry_state": True}, "batch.carry_state: lra/listops has whole examples and no state to"),
        ({"model.pooling": "max"}, "model.pooling: 'max' is none of last, mean"),
    ],
)
def test_errors_in_a_recipe(task_values: Values, changes: dict[str, Any], message: str):
    for key, value in changes.items():
        section, name = key.split(".")
        task_values.setdefault(section, {})[name] = value
    if "model.family" in changes:
        task_values["model"] = {"family": "llama"}
    with pytest.raises(UserError) as raised:
        build_recipe(task_values)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", sorted(LRA_TASKS))
@pytest.mark.parametrize("family", ["llama", "gru", "lama"])
def test_another_family_is_the_only_error_of_the_model(name: str, family: str):
    """Not each of the fields that a recipe sets for minrnn."""
    with pytest.raises(UserError) as raised:
        read_recipe(["--config", f"lra-{name}", "--model.family", family, "--optim.lr", "-1"])
    assert [line.split(": ")[1] for line in str(raised.value).splitlines()] == ["model.family", "optim.lr"]
    assert f"lra/{name} is for minrnn's classifier, not for {family}; leave it out" in str(raised.value)


@pytest.mark.parametrize("name", ["listops", "text", "retrieval"])
def test_a_chunk_holds_the_longest_example(name: str):
    """Also in the recipe for the published length; a greater chunk may be set."""
    short = ["--config", f"lra-{name}", "--data.task", "{max_length: 700}"]
    longest = read_recipe(short).batch.chunk
    assert longest == 700 - (name == "listops")
    assert read_recipe(["--config", f"lra-{name}"]).batch.chunk > 1000
    assert read_recipe([*short, "--batch.chunk", "800"]).batch.chunk == 800
    with pytest.raises(UserError, match=rf"batch.chunk: {longest - 1} does not hold the longest"):
        read_recipe([*short, "--batch.chunk", str(longest - 1)])


def test_wrong_rows_stop_a_run_before_training(task_values: Values, run_recipe: Run, tmp_path: Path):
    folder = tmp_path / "listops"
    folder.mkdir()
    rows = ["Source\tTarget", "( [MAX 2 9 ] )\t9", "[MAX 2 9\t9", "[MIN 2 9 ]\t3", "[SM 9 9 ]\t18"]
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("\n".join(rows) + "\n")
    task_values["data"]["task"] = {"folder": str(folder), "max_length": 24}
    with pytest.raises(UserError) as raised:
        run_recipe(task_values)
    file = folder / "basic_train.tsv"
    assert str(raised.value).splitlines() == [
        f"error: data.task: {file}:3: it ends with 1 open lists",
        f"error: data.task: {file}:4: the expression's value is 2, but its label is 3",
        f"error: data.task: {file}:5: label '18' is not one of 0 to 9",
    ]
    assert not list(Path(task_values["run"]["dir"]).glob("metrics.jsonl"))


def test_files_with_too_few_examples(task_values: Values, run_recipe: Run, tmp_path: Path):
    folder = tmp_path / "listops"
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.tsv").write_text("Source\tTarget\n[MAX 2 9 ]\t9\n")
    task_values["data"]["task"] = {"folder": str(folder), "max_length": 24}
    with pytest.raises(UserError, match="readers: 2 readers cannot share 1 training examples; use fewer"):
        run_recipe(task_values)
    task_values["data"]["task"] |= {"train_examples": 2, "test_examples": 3}
    with pytest.raises(UserError) as raised:
        run_recipe(task_values)
    source = f"of the files of {folder}, which have 1; use fewer"
    assert str(raised.value).splitlines() == [
        f"error: data.task: train_examples: 2 {source}",
        f"error: data.task: test_examples: 3 {source}",
    ]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_loss(task_values: Values, run_recipe: Run, tmp_path: Path, recompute: str):
    kept = run_recipe(task_values)
    task_values["run"]["dir"] = str(tmp_path / recompute)
    task_values["train"]["recompute"] = recompute
    for (_, first), (_, second) in zip(losses(kept), losses(run_recipe(task_values)), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
def test_short_listops_is_learned(run_recipe: Run, tmp_path: Path):
    """A constant answer has 20 %."""
    task = {"min_length": 5, "max_length": 50, "max_depth": 4, "max_args": 4, "train_examples": 20_000}
    values: Values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"cell": "minlstm", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
        "data": {
            "corpus": "lra/listops",
            "task": {**task, "validation_examples": 500, "test_examples": 1000},
            "cache": str(tmp_path / "cache"),
        },
        "batch": {"lanes": 64, "chunk": 50},
        "optim": {"lr": 4e-3},
        "train": {"steps": 400, "log_every": 50, "precision": "fp32"},
        "tracking": {"uri": None},
    }
    folder = run_recipe(values)
    assert entries(folder, "test")[0]["accuracy"] > 0.35
    assert losses(folder)[-1][1] < 0.8 * losses(folder)[0][1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(task_values: Values, run_recipe: Run, tmp_path: Path):
    one = run_recipe(task_values)
    task_values["run"]["dir"] = str(tmp_path / "two")
    task_values["data"]["cache"] = str(tmp_path / "another-cache")
    recipe = recipe_file(task_values, tmp_path)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"]
    command = [sys.executable, *launcher, "-m", "minrnn.pipeline.train", "--config", str(recipe)]
    subprocess.run(command, check=True, timeout=300)
    two = Path(task_values["run"]["dir"])
    for (_, first), (_, second) in zip(losses(one), losses(two), strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    for kind in ("validation", "test"):
        for first, second in zip(entries(one, kind), entries(two, kind), strict=True):
            assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
            assert {**first, "loss": 0} == {**second, "loss": 0}
