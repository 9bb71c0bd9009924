"""A push is one commit of a whole model, replaces only models of its run, and says what the hub refuses."""

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import READ_TOKEN, LocalHub
from push_helpers import use_hub
from run_helpers import train

from minrnn.common.errors import UserError
from minrnn.launch.cli import main
from minrnn.pipeline.export import export_run
from minrnn.pipeline.push import target, worker
from minrnn.pipeline.push.commit import Pushed, push_export, push_run
from minrnn.pipeline.push.errors import HubError
from minrnn.pipeline.push.files import dataset_licences, published_line
from minrnn.pipeline.push.target import MARKER, Identity, PushOptions, open_target
from minrnn.pipeline.recipe import build_recipe
from minrnn.pipeline.run_id import write_run_id

OPTIONS = PushOptions("me/model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps, with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("push")
    corpus = folder / "secret-folder" / "words.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(80)))
    return train(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 0},
            "data": {"corpus": str(corpus), "validation_fraction": 0.1, "workers": 0},
            "batch": {"readers": 1, "lanes": 2, "chunk": 16},
            "train": {
                "precision": "fp32",
                "steps": 8,
                "log_every": 1,
                "eval_every": 4,
                "save_every": 4,
                "sample_tokens": 3,
            },
            "tracking": {"uri": None},
        }
    )


def write_results(run: Path) -> None:
    """Results of lm-eval in the run's folder."""
    content = {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.26, "acc_stderr,none": 0.01}},
        "configs": {"arc_easy": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"}},
        "n-shot": {"arc_easy": 5},
        "config": {"limit": None},
    }
    (run / "evals").mkdir(exist_ok=True)
    (run / "evals" / "lm-eval-1.json").write_text(json.dumps(content))


def test_a_push_is_one_commit_with_the_model_its_card_and_its_record(run: Path, hub: LocalHub):
    write_results(run)
    pushed = push_run(run, OPTIONS)
    files, repository = hub.files("me/model"), hub.repositories["me/model"]
    assert repository.messages == ["", "Step 8"]
    assert pushed == Pushed("me/model", repository.branches["main"], True, False, 8)
    assert not (run / ".push").exists()
    export = {name: (run / "model" / name).read_bytes() for name in files if (run / "model" / name).is_file()}
    assert {"model.safetensors", "config.json", "modeling_minrnn.py", "tokenizer.json"} <= export.keys()
    assert {name: files[name] for name in export if name != "README.md"} == {
        name: content for name, content in export.items() if name != "README.md"
    }
    record = {name for name in files if name.startswith("training/")}
    names = {"metrics.jsonl", "loss.png", "samples.txt", "recipe.yaml", "run.json"}
    assert record == {f"training/{name}" for name in names}
    assert files["training/metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert b"secret-folder" not in b"".join(files.values())
    assert yaml.safe_load(files["training/recipe.yaml"])["data"]["corpus"] == "words.jsonl"


def test_the_metadata_of_a_card_are_those_that_huggingface_hub_reads(run: Path, hub: LocalHub):
    write_results(run)
    push_run(run, replace(OPTIONS, license="apache-2.0"))
    text = hub.files("me/model")["README.md"].decode()
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    validation = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert (data.model_name, data.license, data.library_name) == ("model", "apache-2.0", "transformers")
    results = {result.dataset_name: result for result in data.eval_results}
    assert results["words.jsonl, held out"].metric_value == round(validation["bits_per_byte"], 4)
    arc = results["arc_easy"]
    assert (arc.dataset_type, arc.dataset_config, arc.metric_value) == ("allenai/ai2_arc", "ARC-Easy", 0.26)
    assert arc.dataset_args == {"num_few_shot": 5}
    assert 'from_pretrained("me/model", trust_remote_code=True)' in text
    assert "minrnn generate me/model" in text
    assert "| `words.jsonl` | - | - | unknown |" in text
    assert "![Training and validation loss](training/loss.png)" in text


def test_sources_of_a_mixture_have_public_names_in_the_record():
    entry = {"step": 1, "by_source": {"/home/me/a/x.txt": 1.5, "/home/me/b/x.txt": 2.5, "me/books": 3.5}}
    line = published_line(entry, json.dumps(entry))
    assert json.loads(line)["by_source"] == {"x.txt": 1.5, "x.txt (2)": 2.5, "me/books": 3.5}
    plain = '{"step": 1,   "loss": 2.0}\n'
    assert published_line(json.loads(plain), plain) == plain


def test_scores_of_other_weights_are_not_on_the_card(run: Path, hub: LocalHub):
    write_results(run)
    push_run(run, OPTIONS, step=4)
    files = hub.files("me/model")
    text = files["README.md"].decode()
    assert "arc_easy" not in text
    steps = {json.loads(line)["step"] for line in files["training/metrics.jsonl"].splitlines()}
    assert max(steps) == 4
    assert "training/samples.txt" not in files
    assert "words.jsonl, held out" in text  # that of step 4


def test_a_worker_says_what_it_pushed_or_why_not(run: Path, hub: LocalHub):
    checkpoint = run / "checkpoints" / "step-000008"
    argument = {"run": str(run), "checkpoint": str(checkpoint), "trust": False}
    options = vars(replace(OPTIONS, in_recipe=True))
    result = worker.main(json.dumps({**argument, "options": options}))
    assert result["message"].startswith("pushed to me/model, step 8 (commit ")
    assert (result["warning"], result["step"]) == (None, 8)
    gone = {**argument, "checkpoint": f"{checkpoint}-gone", "options": options}
    assert "step-000008-gone" in worker.main(json.dumps(gone))["error"]
    hub.fault = lambda method, path: 0
    result = worker.main(json.dumps({**argument, "options": options}))
    assert (result["kind"], result["error"][:27]) == ("outage", "the hub cannot be reached: ")


def test_the_same_push_again_sends_and_commits_nothing(run: Path, hub: LocalHub):
    first = push_run(run, OPTIONS)
    sent = list(hub.uploads)
    again = push_run(run, OPTIONS)
    assert again == replace(first, is_new=False)
    assert hub.uploads == sent
    assert len(hub.repositories["me/model"].commits) == 2


def test_a_push_replaces_what_the_last_one_of_its_run_wrote(run: Path, hub: LocalHub):
    push_run(run, OPTIONS)
    repository, marker = hub.repositories["me/model"], json.loads(hub.files("me/model")[MARKER])
    marker["files"]["old_module.py"] = "x"
    tree = dict(repository.commits[repository.branches["main"]])
    tree |= {MARKER: hub.store(json.dumps(marker).encode()), "old_module.py": hub.store(b"old")}
    repository.commit("main", {**tree, "notes.txt": hub.store(b"by hand")}, "by hand")
    push_run(run, OPTIONS, step=4)
    files = hub.files("me/model")
    assert "old_module.py" not in files
    assert "training/samples.txt" not in files
    assert files["notes.txt"] == b"by hand"


def test_another_model_is_refused_unless_it_may_be_overwritten(run: Path, hub: LocalHub):
    before = {"config.json": b"{}", "pytorch_model.bin": b"weights", "LICENSE": b"mine"}
    hub.create("me/model", files=before)
    with pytest.raises(UserError, match=r"holds other files \(config.json, pytorch_model.bin\)") as error:
        push_run(run, OPTIONS)
    assert str(error.value).endswith("or replace what is there with --overwrite")
    assert hub.files("me/model") == before
    push_run(run, replace(OPTIONS, overwrite=True))
    files = hub.files("me/model")
    assert "pytorch_model.bin" not in files
    assert files["LICENSE"] == b"mine"
    repository = hub.repositories["me/model"]
    marker = json.loads(files[MARKER]) | {"run": "another", "weights": "another"}
    tree = repository.commits[repository.branches["main"]]
    repository.commit("main", {**tree, MARKER: hub.store(json.dumps(marker).encode())}, "another run")
    with pytest.raises(UserError, match="holds a model of the run 'run'"):
        push_run(run, OPTIONS)


def test_a_card_that_was_edited_is_kept(run: Path, hub: LocalHub, capsys):
    push_run(run, OPTIONS)
    repository = hub.repositories["me/model"]
    tree = repository.commits[repository.branches["main"]]
    repository.commit("main", {**tree, "README.md": hub.store(b"my words")}, "edit")
    for step in (4, 8):
        main(["push", str(run), "--repo", "me/model", "--step", str(step)])
        assert hub.files("me/model")["README.md"] == b"my words"
        assert "README.md in me/model was written by hand and is kept; --overwrite" in capsys.readouterr().err
    push_run(run, replace(OPTIONS, overwrite=True))
    assert b"my words" not in hub.files("me/model")["README.md"]
    card = run / "model" / "README.md"
    text = card.read_text()
    try:
        card.write_text(text + "\nMy sentence.\n")
        push_run(run, OPTIONS)
    finally:
        card.write_text(text)
    assert hub.files("me/model")["README.md"].decode().endswith("My sentence.\n")


def test_an_export_is_pushed_and_known_by_its_weights(run: Path, tmp_path: Path, hub: LocalHub, capsys):
    out = tmp_path / "out"
    export_run(run, out)
    main(["push", str(out), "--repo", "model"])
    assert "pushed to me/model (commit " in capsys.readouterr().out
    (out / "README.md").write_text("---\ntags: [mine]\n---\nmy card\n")
    main(["push", str(out), "--repo", "model"])
    capsys.readouterr()
    files = hub.files("me/model")
    assert files["README.md"] == (out / "README.md").read_bytes()
    assert [name for name in files if name.startswith("training/")] == [MARKER]
    main(["push", str(out), "--repo", "me/model"])
    assert "me/model holds this model already" in capsys.readouterr().out
    export_run(run, tmp_path / "other", step=4)
    staged = tmp_path / "staged"
    staged.mkdir()
    with pytest.raises(UserError, match="holds a model of the run 'out'"):
        push_export(tmp_path / "other", OPTIONS, staged)


def test_a_branch_is_created_from_main(run: Path, hub: LocalHub):
    push_run(run, OPTIONS)
    push_run(run, replace(OPTIONS, revision="step-4"), step=4)
    assert json.loads(hub.files("me/model", "step-4")[MARKER])["step"] == 4
    assert json.loads(hub.files("me/model")[MARKER])["step"] == 8
    assert b'"me/model", revision="step-4"' in hub.files("me/model", "step-4")["README.md"]


def test_a_branch_is_named_and_not_empty(run: Path, hub: LocalHub, capsys):
    words = ["push", str(run), "--repo", "me/model", "--revision"]
    for done in ("pushed to me/model, branch a/b, step 8", "me/model, branch a/b holds this model already"):
        main([*words, "a/b"])
        assert done in capsys.readouterr().out
    hub.requests.clear()
    with pytest.raises(SystemExit):
        main([*words, "", "--license", ""])
    error = capsys.readouterr().err
    assert "--revision: must not be empty" in error
    assert "--license: must not be empty" in error
    assert not hub.requests


def test_a_run_without_a_checkpoint_is_a_run(tmp_path: Path, hub: LocalHub, capsys):
    """It was stopped before its first save."""
    write_run_id(tmp_path, "id")
    for options, message in (([], "holds no valid checkpoint"), (["--step", "4"], "no checkpoint of step 4")):
        with pytest.raises(SystemExit):
            main(["push", str(tmp_path), "--repo", "me/model", *options])
        assert message in capsys.readouterr().err
    assert not hub.repositories


def test_licences_of_datasets_are_those_of_the_hub(hub: LocalHub):
    hub.licences = {"me/books": "cc-by-4.0"}
    sources = [{"corpus": name, "commit": "0" * 40} for name in ("me/books", "me/gone")]
    data = build_recipe({}).data.model_dump() | {"corpus": [*sources, {"corpus": "local.txt"}]}
    assert dataset_licences(data) == {"me/books": "cc-by-4.0"}


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        (OPTIONS, None, r"there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN"),
        (OPTIONS, "hf_wrong", "the hub does not accept this token"),
        (OPTIONS, READ_TOKEN, "the token 'test' may only read"),
        (PushOptions("you/model"), "hf_write", r"you is neither the user of this token .*; name me/model"),
        (PushOptions("a/b/c"), "hf_write", r"'a/b/c'.*Write USER/NAME"),
        (PushOptions("me/mo del"), "hf_write", "must use alphanumeric chars"),
        (PushOptions("https://hub/me/model"), "hf_write", r"'https://hub/me/model'. Write USER/NAME"),
        (PushOptions("me/refused"), "hf_write", r"the hub refuses me/refused \(Invalid repo name"),
        (PushOptions("me/public", private=True), "hf_write", "me/public is public"),
        (PushOptions("me/public", revision="x" * 3, in_recipe=True), "hf_write", "push.overwrite: true"),
    ],
)
def test_what_the_hub_refuses_is_said(
    options: PushOptions,
    token: str | None,
    message: str,
    hub: LocalHub,
    monkeypatch,
):
    hub.create("me/public", files={"config.json": b"{}"})
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as error:
        open_target(options, Identity("run"))
    assert error.value.errors[0][0] in (options.name("repo"), options.name("private"))


@pytest.mark.parametrize("silent", ["/api/whoami-v2", "/api/models/me/public"])
def test_a_hub_that_never_answers_is_an_error(silent: str, hub: LocalHub, monkeypatch):
    hub.create("me/public")
    monkeypatch.setattr(target, "TIMEOUT", 0.2)
    huggingface_hub.close_session()
    is_over = threading.Event()

    def wait(method: str, path: str) -> None:
        if path == silent:
            is_over.wait(30)

    hub.fault = wait
    try:
        with pytest.raises(HubError, match="the hub cannot be reached") as error:
            open_target(PushOptions("me/public"), Identity("run"))
    finally:
        is_over.set()
    assert error.value.kind == "outage"


def test_a_push_that_meets_another_commit_changes_nothing(run: Path, hub: LocalHub):
    hub.create("me/model")
    repository = hub.repositories["me/model"]

    def commit_first(method: str, path: str) -> None:
        if "/commit/" in path and len(repository.commits) == 1:
            repository.commit("main", {}, "another")

    hub.fault = commit_first
    with pytest.raises(HubError, match="was changed by someone else during the push"):
        push_run(run, OPTIONS)
    assert hub.files("me/model") == {}


@given(at=st.integers(0, 12), status=st.sampled_from([0, 500, 403]))
@settings(max_examples=5)
def test_a_server_that_dies_leaves_the_repository_whole(run: Path, at: int, status: int):
    """At any request. The push after it makes it complete, and sends no file twice."""
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(hub, patch, run)
        push_run(run, OPTIONS, step=4)
        before = hub.files("me/model")
        first = len(hub.requests)
        hub.fault = lambda method, path: status if len(hub.requests) > first + at else None
        with contextlib.suppress(HubError):
            push_run(run, OPTIONS)
            before = hub.files("me/model")
        assert hub.files("me/model") == before
        hub.fault = lambda method, path: None
        push_run(run, OPTIONS)
        files = hub.files("me/model")
        marker = json.loads(files[MARKER])
        assert marker["step"] == 8
        assert set(marker["files"]) | {MARKER} == set(files)
        assert len(hub.uploads) == len(_large(hub))


def _large(hub: LocalHub) -> set[str]:
    """The SHA-256 of the large files of all commits."""
    trees = hub.repositories["me/model"].commits.values()
    return {oid for tree in trees for path, oid in tree.items() if path.endswith((".safetensors", ".png"))}
