"""An export takes nothing that is not its own, publishes nothing that is private, and is whole whenever it is cut off."""

from pathlib import Path

from minrnn.data.tokenizer import byte_tokenizer
from minrnn.models import MinRNNForCausalLM
from minrnn.pipeline.export import export_model, model_config
from minrnn.pipeline.recipe import build_recipe, resolved

TOKENIZER = byte_tokenizer()
SECRET = "s3cret"


def tiny_model(hidden_size: int = 16) -> MinRNNForCausalLM:
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": 1, "intermediate_size": 16}
    return MinRNNForCausalLM(model_config(sizes, TOKENIZER, 264))


def export(folder: Path, hidden_size: int = 16, **sections) -> None:
    export_model(tiny_model(hidden_size), TOKENIZER, folder, resolved(build_recipe(sections)), tokens=7)


def test_nothing_that_is_private_is_in_an_export(tmp_path: Path):
    private = tmp_path / "private"
    export(
        tmp_path / "out",
        run={"dir": str(private / "run")},
        data={"corpus": str(private / "words.jsonl"), "validation": str(private / "held.jsonl"), "tokenizer": str(private / "tokenizer")},
        model={"init_from": str(private / "start")},
        tracking={"uri": f"https://me:{SECRET}@mlflow.org?token={SECRET}"},
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on `words.jsonl`" in card
    assert "dir: run\n" in card
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content
        assert str(tmp_path).encode() not in content


def test_no_credentials_are_in_what_config_yaml_holds(tmp_path: Path):
    recipe = build_recipe({"tracking": {"uri": f"https://me:{SECRET}@mlflow.org"}, "run": {"dir": str(tmp_path)}})
    assert recipe.tracking.uri == f"https://me:{SECRET}@mlflow.org"
    assert resolved(recipe)["tracking"]["uri"] == "https://mlflow.org"
    assert resolved(recipe)["run"]["dir"] == str(tmp_path)
