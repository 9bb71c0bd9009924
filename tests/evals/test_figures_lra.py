"""`minrnn figures lra`: every run of its grid is a valid recipe."""

from pathlib import Path

import pytest
import yaml

from minrnn.common.errors import UserError
from minrnn.evals.figures.lra import GRID, command_of, main
from minrnn.pipeline.recipe import read_recipe

RUNS = yaml.safe_load(GRID.read_text())["runs"]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_each_run_is_a_valid_recipe(name: str, tmp_path: Path):
    folders: dict[str, Path | None] = {"IMDB": tmp_path / "imdb", "CIFAR10": tmp_path / "cifar10"}
    command = command_of(RUNS[name], tmp_path / name, 1, folders)
    recipe = read_recipe(command[command.index("train") + 1 :])
    assert recipe.run.seed == 1
    assert recipe.data.task.get("folder", str(tmp_path)).startswith(str(tmp_path))


def test_the_ablation_has_all_four_blocks():
    blocks = {
        name: (fields.get("model.conv_kernel", 4) > 0, fields["model.intermediate_size"] > 0)
        for name, fields in ((name, run["settings"]) for name, run in RUNS.items() if "listops-short" in name)
    }
    assert sorted(blocks.values()) == [(False, False), (False, True), (True, False), (True, True)]


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="--only: 'listop' is none of listops-short-none"):
        main(["--only", "listop"])
