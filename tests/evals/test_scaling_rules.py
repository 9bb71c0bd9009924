"""The check of a ladder's learning rate finds the best of the grid, and says when the grid cannot show it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.evals.scaling.command import main
from minrnn.evals.scaling.rates import FACTOR, Curve, read_curves, verdict

FACTORS = [0.25, 0.44, 0.67, 1, 1.5, 2.25, 4]


def curve(optimum: float, curvature: float = 1.0, factors: list[float] = FACTORS) -> Curve:
    """Losses that are a parabola over the logarithm of the learning rate."""
    losses = {factor: 2 + curvature * math.log(factor / optimum) ** 2 for factor in factors}
    return Curve("minGRU", 10**5, 10**6, {factor: 0.01 * factor for factor in factors}, losses)


@settings(max_examples=20)
@given(st.floats(0.5, 2.0), st.floats(0.01, 10.0))
def test_the_minimum_of_a_parabola_is_found(optimum: float, curvature: float):
    own = curve(optimum, curvature)
    assert own.optimum == pytest.approx(optimum, rel=1e-3)
    assert abs(math.log(own.best / optimum)) <= math.log(1.6) / 2 + 1e-9  # no step of the grid is longer
    assert own.holds == (1 / FACTOR <= own.best <= FACTOR)
    assert own.excess == pytest.approx(own.losses[1] - min(own.losses.values()))


@pytest.mark.parametrize("optimum", [0.1, 10.0])
def test_a_best_at_the_end_of_the_grid_shows_nothing(optimum: float):
    own = curve(optimum)
    assert (own.is_at_the_end, own.holds, own.optimum) == (True, False, None)
    assert "at the end of the grid" in verdict([own], ["adamw"])
    narrow = curve(2.0, factors=[0.67, 1, 1.5])
    assert not narrow.holds


def test_a_rule_whose_own_runs_diverged_is_said_to():
    losses = {**curve(0.5).losses, 1: math.inf}
    own = Curve("minGRU", 10**5, 10**6, dict.fromkeys(losses, 0.01), losses)
    assert own.to_json()["excess"] is None
    assert "At 100,000 parameters the rule's learning rate diverged or failed." in verdict([own], ["adamw"])
    none = Curve("minGRU", 10**5, 10**6, own.rates, dict.fromkeys(losses, math.inf))
    assert json.dumps(none.to_json(), allow_nan=False)
    assert "nan" not in verdict([none], ["adamw"])


def write_ladder(folder: Path, optimum: float = 1.0, sizes: int = 3) -> None:
    """A ladder whose runs are finished, except for the largest learning rate, at which runs failed."""
    runs = []
    for size in range(1, sizes + 1):
        for factor in FACTORS:
            name = f"minGRU-{size}-lr{factor}x"
            settings = {"model.num_parameters": size, "optim.lr": 0.01 * factor}
            entry = {"family": "minGRU", "tokens": 10 * size, "lr_factor": factor, "settings": settings}
            runs.append({"name": name, **entry})
            if factor == FACTORS[-1]:
                (folder / "failed").mkdir(exist_ok=True)
                (folder / "failed" / f"{name}.json").write_text("{}")
                continue
            run = folder / "runs" / name
            run.mkdir(parents=True)
            (run / "config.yaml").write_text("train: {steps: 5}\noptim: {lr: 1}\n")
            loss = {"loss": 9.0, "bits_per_byte": 2 + math.log(factor / optimum) ** 2}
            (run / "metrics.jsonl").write_text(json.dumps({"kind": "validation", "step": 5, **loss}) + "\n")
            (run / ".finished").touch()
    ladder = {"sizes": list(range(sizes)), "lr_factors": FACTORS}
    (folder / "sweep.json").write_text(json.dumps({"sweep": {"ladder": ladder}, "runs": runs}))


def test_the_command_writes_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_ladder(tmp_path, optimum=1.4)
    main([str(tmp_path), "--check-rules"])
    result = json.loads((tmp_path / "fit" / "rules.json").read_text())
    assert {"command", "commit", "machine", "versions", "kind"} <= result.keys()
    assert [each["best"] for each in result["curves"]] == [1.5] * 3
    assert all(each["holds"] for each in result["curves"])
    assert result["curves"][0]["points"][-1]["loss"] is None
    assert "within a factor of 1.5 of the best at 3 of 3 sizes" in capsys.readouterr().out
    assert (tmp_path / "fit" / "rules.png").stat().st_size > 5_000


def test_folders_that_cannot_show_it_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no sweep\.json"):
        read_curves(tmp_path)
    write_ladder(tmp_path, sizes=2)
    with pytest.raises(UserError, match="7 learning rates for 2 sizes"):
        read_curves(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_ladder(other)
    (other / "runs" / "minGRU-2-lr1x" / ".finished").unlink()
    with pytest.raises(UserError, match="1 runs are not finished: minGRU-2-lr1x"):
        read_curves(other)
