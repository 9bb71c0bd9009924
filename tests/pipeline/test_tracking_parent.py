"""The MLflow run that the runs of a sweep are nested in exists once."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minrnn.common.errors import UserError
from minrnn.pipeline.recipe import build_recipe
from minrnn.pipeline.tracking_parent import NAME_TAG, PARENT_TAG, parent_tags


class Client:
    """The part of MlflowClient that is used, in memory and slow, so that requests overlap."""

    def __init__(self):
        self.runs: list[Any] = []

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        found = [
            run
            for run in self.runs
            if run.experiment in experiments and query == f"tags.`{NAME_TAG}` = '{run.tags.get(NAME_TAG)}'"
        ]
        time.sleep(0.01)
        return found[:max_results]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        run = SimpleNamespace(
            experiment=experiment, tags=tags, info=SimpleNamespace(run_id=f"{run_name}-{len(self.runs)}")
        )
        self.runs.append(run)
        return run


def test_the_first_of_many_children_creates_the_parent_and_all_share_it(tmp_path: Path):
    client, tags = Client(), []

    def connect(name: str, experiment: str, number: int) -> None:
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        tags.append((name, experiment, parent_tags(client, experiment, name, folder)))

    places = [("a", "1"), ("b", "1"), ("a", "2")]
    threads = [threading.Thread(target=connect, args=(*places[i % 3], i)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(client.runs) == 3
    for place in places:
        parents = {tag[PARENT_TAG] for *other, tag in tags if tuple(other) == place}
        assert len(parents) == 1
    assert parent_tags(client, "1", None, tmp_path / "run0") == {}
    assert len(client.runs) == 3


def test_a_name_that_mlflow_cannot_search_for_is_refused():
    with pytest.raises(UserError, match=r"tracking\.parent"):
        build_recipe({"tracking": {"parent": "it's"}})
