"""The code on a model card runs, for classifiers and for each family."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny_families import FIELDS, tiny_model

from minrnn.data import LabelledTask, build_task, byte_tokenizer, model_vocab_size
from minrnn.launch.cli import main
from minrnn.pipeline.card import Generation, ModelFacts, Publication, TrainingFacts, model_card
from minrnn.pipeline.classification import classifier_fields, new_model
from minrnn.pipeline.export import export_model, model_config
from minrnn.pipeline.recipe import build_recipe, resolved_config


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("listops", ["[MAX 2 9 ]"]),
        ("image", ["0 255 7"]),
        ("text", ["good"]),
        ("retrieval", ["one", "other"]),
    ],
)
def test_the_code_on_a_classifiers_card_runs(name: str, texts: list[str], tmp_path: Path, capsys):
    config = resolved_config(build_recipe({"data": {"corpus": f"lra/{name}"}}))
    task = build_task(f"lra/{name}")
    assert isinstance(task, LabelledTask)
    tokenizer = task.tokenizer()
    fields = {"hidden_size": 8, "num_hidden_layers": 1, **classifier_fields(f"lra/{name}", {})}
    model = new_model("minrnn", model_config(fields, tokenizer, model_vocab_size(tokenizer)))
    export_model(model, tokenizer, tmp_path / "out", config, tokens=7)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"trained with `minrnn` on `lra/{name}`: 7 tokens.\nIt reads {task.INPUT}. Its labels are" in card
    code = card.split("```python\n")[1].split("```")[0]
    names = dict(zip(("TEXT", "OTHER_TEXT"), texts, strict=False))
    exec(code, {"PATH": str(tmp_path / "out"), **names})
    assert capsys.readouterr().out.splitlines()[-1] in task.LABELS


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {}) for name in FIELDS),
        ("recurrent_gemma", {"num_hidden_layers": 2}),
        ("xlstm", {"hidden_size": 64}),
    ],
)
def test_the_code_on_a_family_s_card_runs(name: str, fields: dict[str, Any], tmp_path: Path, capsys):
    """Where `generate()` has no cache, or fails, the card has a command of minrnn."""
    model, out = tiny_model(name, **fields), tmp_path / "out"
    export_model(model, byte_tokenizer(), out, resolved_config(build_recipe({})), tokens=7)
    language, code = (out / "README.md").read_text().split("```")[1].split("\n", 1)
    has_command = name == "recurrent_gemma" or bool(fields)
    assert language == ("bash" if has_command else "python")
    assert ("trust_remote_code=True" in code) == (name in ("gru", "lstm"))
    capsys.readouterr()
    if has_command:
        command, *arguments = shlex.split(code.replace("PATH", str(out)))
        assert command == "minrnn"
        main([*arguments[:-1], "3"])
    else:
        exec(code, {"PATH": str(out)})
    assert "def main" in capsys.readouterr().out


def test_the_command_of_a_branch_s_card_reads_that_branch():
    """Also of a model that only minrnn generates with."""
    training = TrainingFacts(resolved_config(build_recipe({})), tokens=1)
    model = ModelFacts("cell", 1, Generation(has_state=False, has_exact_cache=False))
    text = model_card("name", model, training, Publication("me/model", "step 4"))
    commands = text.split("```bash\n")[1].splitlines()[:2]
    assert commands[0] == "hf download me/model --revision 'step 4' --local-dir model"
    assert commands[1].startswith("minrnn generate model ")


def test_a_card_without_scores_says_so():
    config = resolved_config(build_recipe({}))
    for score, expected in (
        ("", "It was not evaluated."),
        (", 2.0", "It was evaluated only as stated above."),
    ):
        text = model_card("name", ModelFacts("mingru", 1), TrainingFacts(config, tokens=1, score=score))
        assert expected in text


def test_a_card_says_that_padding_is_read():
    config = resolved_config(build_recipe({}))
    for skips in (True, False):
        model = ModelFacts("cell", 1, Generation(has_state=False, skips_padding=skips))
        text = model_card("name", model, TrainingFacts(config, tokens=1))
        assert ("Padding before a text is read as text" in text) != skips
