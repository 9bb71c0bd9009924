"""Settings of a mixture, and the order that a corpus gets."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minrnn.common.errors import UserError
from minrnn.data import BYTES, CorpusSpec, Encoder, MixtureSpec, ValidationSet, byte_tokenizer
from minrnn.pipeline.corpora import corpus_spec
from minrnn.pipeline.data_order import order_note, with_order
from minrnn.pipeline.evaluation import make_held_out, validation_sets
from minrnn.pipeline.recipe import build_recipe, read_recipe, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged, with_saved_settings
from minrnn.pipeline.source_settings import source_names


def errors_of(corpus: Any, **data) -> list[str]:
    with pytest.raises(UserError) as raised:
        build_recipe({"data": {"corpus": corpus, **data}})
    return str(raised.value).splitlines()


def resolved(values: dict[str, Any]) -> Any:
    recipe = build_recipe(values)
    return with_order(recipe, corpus_spec(recipe))


def test_a_list_on_the_command_line_and_in_a_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"data": {"corpus": ["a.txt", {"corpus": "b", "weight": 2, "subset": "x"}]}})
    )
    typed = "--data.corpus=[a.txt, {corpus: b, weight: 2, subset: x}]"
    in_file, on_line = read_recipe(["--config", str(path)]), read_recipe([typed])
    assert in_file.data == on_line.data
    mixture = corpus_spec(on_line)
    assert isinstance(mixture, MixtureSpec)
    assert mixture.weights == pytest.approx((1 / 3, 2 / 3))
    assert [(source.corpus, source.subset) for source in mixture.sources] == [("a.txt", None), ("b", "x")]
    assert mixture.sources[0].held_out == on_line.data.validation_fraction


def test_a_source_inherits_what_it_leaves_out():
    data = {
        "corpus": ["a.jsonl", {"corpus": "b.jsonl", "text_field": "body"}],
        "text_field": "content",
        "split": "all",
    }
    mixture = corpus_spec(build_recipe({"data": data}))
    assert isinstance(mixture, MixtureSpec)
    assert [(source.text_field, source.split) for source in mixture.sources] == [
        ("content", "all"),
        ("body", "all"),
    ]


def test_all_errors_of_sources_are_reported():
    sources = [
        "a.txt",
        {"corpus": "b", "wieght": 2},
        {"weight": 1},
        "lra/listops",
        {"corpus": "a.txt", "weight": 3},
        {"corpus": "c", "weight": -1},
        {"corpus": "d", "weight": 0},
        {"corpus": "e", "weight": float("inf")},
        {"corpus": "e", "order": "windows"},
    ]
    lines = errors_of(sources)
    for expected in (
        "corpus[1].wieght: unknown key (did you mean weight?)",
        "corpus[2].corpus: is missing; a source is a name or a mapping",
        "corpus[3]: lra/listops is a task, which cannot be part of a mixture",
        "corpus[4]: a.txt is in the list twice, also as corpus[0]",
        "corpus[5].weight: must be a positive number, not -1",
        "corpus[6].weight: must be a positive number, not 0",
        "corpus[7].weight: must be a positive number, not inf",
        "corpus[8].order: input should be 'auto', 'documents' or 'passages', not 'windows'",
    ):
        assert sum(line.startswith(f"error: data.{expected}") for line in lines) == 1
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("corpus", "problem"),
    [
        ([], "a mixture needs sources"),
        (["a", 3], "each source is a name or a mapping"),
        ("[a.txt, {corpus: b weight: 2}]", "is not a list in YAML"),
        (7, "input should be a valid string, not 7"),
        ("", "string should have at least 1 character"),
    ],
)
def test_what_is_neither_a_name_nor_a_list_of_sources(corpus: Any, problem: str):
    (line,) = errors_of(corpus)
    assert line.startswith(f"error: data.corpus: {problem}")


def test_other_orders_are_for_a_single_corpus():
    for order in ("windows", "continuous"):
        (line,) = errors_of(["a", "b"], order=order)
        assert line.startswith(f"error: data.order: {order} is for a single corpus")


def test_sources_of_one_corpus_have_different_names():
    corpus = [{"corpus": "b", "subset": "x"}, {"corpus": "b", "subset": "y"}, {"corpus": "http://u:p@host/c"}]
    assert source_names(build_recipe({"data": {"corpus": corpus}}).data.corpus) == [
        "b x",
        "b y",
        "http://host/c",
    ]


def test_few_text_files_are_read_continuously(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("some text\n" * 9)
    (tmp_path / "empty.txt").write_text("")
    values = {"data": {"corpus": str(tmp_path)}, "batch": {"readers": 2, "lanes": 2}}
    recipe = resolved(values)
    assert recipe.data.order == "continuous"
    spec = corpus_spec(recipe)
    assert isinstance(spec, CorpusSpec)
    assert spec.passages
    assert "4 lanes read on" in (order_note(recipe) or "")
    few = resolved({**values, "batch": {"readers": 1, "lanes": 3}})
    assert (few.data.order, order_note(few)) == ("documents", None)
    assert resolved({**values, "data": {"corpus": str(tmp_path), "order": "windows"}}).data.order == "windows"
    assert resolved({"data": {"corpus": "synthetic/parity"}}).data.order == "auto"
    mixed = resolved({**values, "data": {"corpus": [str(tmp_path), "name/of-a-dataset"]}})
    assert [source["order"] for source in mixed.data.corpus] == ["passages", "documents"]
    assert mixed.data.order == "documents"
    assert f"read in passages, with the end of the text held out: {tmp_path}" == order_note(mixed)


def test_a_run_keeps_its_order_although_files_are_added(tmp_path: Path):
    (tmp_path / "0.txt").write_text("some text\n" * 9)
    for corpus in (str(tmp_path), [str(tmp_path), "name/of-a-dataset"]):
        values = {"data": {"corpus": corpus}, "batch": {"lanes": 2}}
        saved = resolved_config(resolved(values))
        assert yaml.safe_load(yaml.safe_dump(saved)) == saved
        (tmp_path / "1.txt").write_text("some text\n" * 9)
        check_unchanged(saved, build_recipe(values), "run")
        assert with_saved_settings(build_recipe(values), saved).data.model_dump() == saved["data"]
        with pytest.raises(UserError, match=r"data\.(order|corpus)"):
            check_unchanged(saved, resolved(values), "run")
        (tmp_path / "1.txt").unlink()


def held_out(values: dict[str, Any]) -> list[ValidationSet]:
    recipe = resolved(values)
    encoder = Encoder.from_tokenizer(byte_tokenizer(), BYTES)
    made = make_held_out(recipe, corpus_spec(recipe), encoder)
    sets = validation_sets(recipe, made, range(recipe.batch.readers))
    assert all(isinstance(part, ValidationSet) for part in sets)
    return [part for part in sets if isinstance(part, ValidationSet)]


def test_a_long_text_for_validation_is_read_in_passages(tmp_path: Path):
    """By all lanes of all readers, up to the limit."""
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("some text\n" * 9000)
    names = {"corpus": str(tmp_path / "train.txt"), "validation": str(tmp_path / "validation.txt")}
    sets = held_out({"data": {**names, "validation_tokens": 50_000}, "batch": {"readers": 2, "lanes": 2}})
    assert all(documents for part in sets for documents in part.lanes)
    assert 50_000 <= sum(part.num_positions for part in sets) < 50_000 + 8192 + 10


def test_each_source_holds_out_its_share(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} some text\n" * 9000)
    corpus = [str(tmp_path / "a.txt"), {"corpus": str(tmp_path / "b.txt"), "weight": 3}]
    data = {"corpus": corpus, "validation_fraction": 0.5, "validation_tokens": 40_000}
    sets = held_out({"data": data, "batch": {"readers": 2, "lanes": 2}})
    for name, expected in zip("ab", (10_000, 30_000), strict=True):
        own = [part for part in sets if part.source == str(tmp_path / f"{name}.txt")]
        assert expected <= sum(part.num_positions for part in own) < expected + 8192 + 12
        tokens = {
            bytes(tokens[1:2].astype("uint8")) for part in own for lane in part.lanes for tokens in lane
        }
        assert tokens == {name.encode()}
