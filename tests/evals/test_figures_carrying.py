"""`minrnn figures carrying`: its sweeps, and results from made-up runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from minrnn.common.errors import UserError
from minrnn.evals.figures import carrying
from minrnn.launch.sweep.expand import PlannedRun, expand
from minrnn.launch.sweep.spec import Sweep

FOLDER = Path(carrying.__file__).parent


def runs_of(name: str) -> list[PlannedRun]:
    return expand(Sweep.read(str(FOLDER / f"{name}.yaml")))


@pytest.mark.parametrize("name", ["distance", "long-books"])
def test_all_variants_read_the_same_tokens_in_the_same_steps(name: str):
    runs = runs_of(name)
    assert len({(run.recipe.batch.tokens_per_step, run.recipe.train.steps) for run in runs}) == 1
    fields = ("hidden_size", "num_hidden_layers", "memory_length", "cell")
    assert len({tuple(getattr(run.recipe.model, field) for field in fields) for run in runs}) == 1
    assert len({run.recipe.run.seed for run in runs}) == 3
    later = runs_of(f"{name}-later")
    names = {f"runs/{name}/runs/{run.name}/model": run for run in runs}
    for run in later:
        first = names[str(run.recipe.model.init_from)].recipe  # a run of the first sweep
        assert not first.batch.carry_state
        assert run.recipe.batch.carry_state
        assert run.recipe.data == first.data
        assert run.recipe.train.steps <= first.train.steps / 100
        assert run.recipe.batch.tokens_per_step == first.batch.tokens_per_step


def made_up_sweep(folder: Path) -> Path:
    """Two variants with three seeds, and a run that is not finished."""
    planned = [
        {"name": f"{variant}-seed{seed}", "family": variant}
        for variant in ("reset", "later-of-0", "later-of-1")
        for seed in range(3)
    ]
    for number, run in enumerate(planned[:-1]):
        run_folder = folder / "runs" / run["name"]
        (run_folder / "evals").mkdir(parents=True)
        (run_folder / ".finished").touch()
        points = [{"from": 64, "to": 128, "carried": 20.0 + number, "reset": 10.0}]
        trained = "reset" if run["family"] == "reset" else "carried"
        result = {"trained": trained, "points": points, "chance": 6.25}
        (run_folder / "evals" / "carrying.json").write_text(json.dumps(result))
    (folder / "sweep.json").write_text(json.dumps({"runs": planned}))
    return folder


def test_seeds_are_pooled_into_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(carrying, "RESULTS", tmp_path)
    assert carrying.docs_text("distance") == carrying.NOT_TRAINED
    carrying.main([str(made_up_sweep(tmp_path / "sweep")), "--name", "distance"])
    assert "1 of 9 runs" in capsys.readouterr().err
    rows = json.loads((tmp_path / "carrying-distance.json").read_text())["rows"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("reset", 3), ("later", 5)]
    assert rows[0]["carried"]["mean"] == pytest.approx(21)
    # t(2) = 4.303 at 97.5 %, a standard deviation of 1, three seeds
    assert rows[0]["carried"]["half_width"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert (tmp_path / "carrying-distance.png").read_bytes().startswith(b"\x89PNG")
    text = carrying.docs_text("distance")
    assert "| reset | reset | 3 | 10.0 ± 0.0 |" in text
    assert "| reset | carried | 3 | 21.0 ± 2.5 |" in text
    assert "| later | carried | 5 |" in text
    assert "chance 6.2" in text


def test_losses_by_position_are_means_over_the_documents_that_reach_them():
    short, long = ([[first] * count, [second] * count] for first, second, count in ((1, 2, 100), (3, 4, 300)))
    nats = [np.array(short, np.float64), np.array(long, np.float64)]
    points = carrying.position_points(nats)
    assert [(point["from"], point["to"]) for point in points] == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert [point["carried"] for point in points] == pytest.approx([2, (36 + 3 * 64) / 100, 3, 3])
    assert points[0]["reset"] == 3


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        carrying.main([str(tmp_path), "--name", "books"])
