"""The texts of a run: validation is made once, and a run goes on with the text that it began with."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from run_helpers import Values, losses, stop_at_step_7

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, open_source
from minrnn.data.sources import Position
from minrnn.pipeline import corpora
from minrnn.pipeline.corpora import corpus_spec, single_corpus_spec, with_commits
from minrnn.pipeline.evaluation import validation_errors, validation_spec
from minrnn.pipeline.recipe import build_recipe, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged, with_saved_settings

Run = Callable[[Values], Path]


def test_validation_is_made_once_and_again_if_something_changed(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, capfd
):
    calls = []
    original = corpora.make_held_out
    monkeypatch.setattr(corpora, "make_held_out", lambda *a: calls.append(a) or original(*a))
    stop_at_step_7(values, run_recipe, monkeypatch)
    assert len(calls) == 1
    assert "documents read for it; kept in" in capfd.readouterr().err
    folder = run_recipe(values)
    assert len(calls) == 1, "a restart reads the file"
    assert len(list((folder / "validation").iterdir())) == 3
    values["data"]["validation_tokens"] = 700
    values["train"]["steps"] = 14
    run_recipe(values)
    assert len(calls) == 2
    assert len(list((folder / "validation").iterdir())) == 3


def test_a_run_goes_on_if_its_corpora_have_moved(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only if it is said, and only if the text is the same."""
    for name in ("corpus", "validation"):
        shutil.copy(values["data"]["corpus"], tmp_path / f"{name}.jsonl")
        values["data"][name] = str(tmp_path / f"{name}.jsonl")
    values["run"]["dir"] = str(tmp_path / "whole")
    expected = losses(run_recipe(values))
    values["run"]["dir"] = str(tmp_path / "run")
    stop_at_step_7(values, run_recipe, monkeypatch)
    for name in ("corpus", "validation"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        values["data"][name] = str((tmp_path / f"{name}.jsonl").rename(tmp_path / "moved" / f"{name}.jsonl"))
    with pytest.raises(UserError, match=r"only moved, say so with --run\.change \[data\.corpus\]") as caught:
        run_recipe(values)
    assert [key for key, _ in caught.value.errors] == ["data.corpus", "data.validation"]
    values["run"]["change"] = ["data.corpus", "data.validation"]
    for name in ("corpus", "validation"):
        path = tmp_path / "moved" / f"{name}.jsonl"
        text = path.read_text()
        path.write_text(text.replace("state", "State"))
        with pytest.raises(UserError, match=rf"data\.{name}: .* is not what the run began with: .*jsonl has"):
            run_recipe(values)
        path.write_text(text)
    assert losses(run_recipe(values)) == expected


def test_a_validation_corpus_without_splits_needs_none(values: Values, tmp_path: Path):
    """The default of data.validation_split is for datasets with splits. Another one is an error."""
    whole = datasets.Dataset.from_dict({"text": ["a text"]})
    whole.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict({"validation": whole}).save_to_disk(tmp_path / "parts")
    for name, split in (("whole", "train"), ("parts", "validation")):
        values["data"]["validation"] = str(tmp_path / name)
        recipe = build_recipe(values)
        spec, part = validation_spec(recipe, corpus_spec(recipe))
        assert isinstance(spec, CorpusSpec)
        assert spec.split == split
        assert [document.text for document in open_source(spec, part).read(0, Position())] == ["a text"]
    values["data"] |= {"validation": values["data"]["corpus"], "validation_split": "test"}
    recipe = build_recipe(values)
    spec, part = validation_spec(recipe, corpus_spec(recipe))
    assert isinstance(spec, CorpusSpec)
    problem = r"data\.validation_split: is 'test', but .* is made of files"
    with pytest.raises(UserError, match=problem), validation_errors(recipe):
        open_source(spec, part)


def test_a_hub_revision_is_resolved_once_and_kept(monkeypatch: pytest.MonkeyPatch):
    commits = {("org/a", "main"): "a" * 40, ("org/b", None): "b" * 40}
    monkeypatch.setattr(corpora, "resolve_commit", lambda *name: commits[name])
    data = {"corpus": "org/a", "revision": "main", "validation": "org/b", "validation_subset": "small"}
    recipe = build_recipe({"data": data})
    resolved = with_commits(recipe)
    assert single_corpus_spec(resolved).revision == "a" * 40
    spec, part = validation_spec(resolved, corpus_spec(resolved))
    assert isinstance(spec, CorpusSpec)
    assert (spec.corpus, spec.subset, spec.split, spec.revision) == ("org/b", "small", "validation", "b" * 40)
    assert (part, spec.held_out) == ("all", 0.0)
    saved = resolved_config(resolved)
    check_unchanged(saved, recipe, "run")
    monkeypatch.setattr(corpora, "resolve_commit", lambda *name: pytest.fail("asked again"))
    again = with_commits(with_saved_settings(recipe, saved))
    assert again.data == resolved.data
    other = dataclasses.replace(recipe, data=recipe.data.model_copy(update={"revision": "v2"}))
    with pytest.raises(UserError, match=r"data\.revision: is 'v2', but .* was started with 'main'"):
        check_unchanged(saved, other, "run")


def test_local_corpora_have_no_commit(values: Values):
    recipe = build_recipe(values)
    assert with_commits(recipe) == recipe


def test_a_run_killed_while_it_made_its_validation_starts_again(values: Values, run_recipe: Run):
    """Its folder has no config.yaml yet, but holds nothing that somebody else has written."""
    folder = Path(values["run"]["dir"], "validation")
    folder.mkdir(parents=True)
    for name in (f"tokens-{'0' * 16}.npy", f".documents-{'0' * 16}.npy.part", ".manifest.json.part"):
        (folder / name).touch()
    (folder / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"run\.dir: .* holds validation, which the run would overwrite"):
        run_recipe(values)
    (folder / "thesis.txt").unlink()
    values["train"]["steps"] = 1
    run_recipe(values)
