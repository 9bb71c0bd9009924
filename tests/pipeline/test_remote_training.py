"""Training over a server that fails: the losses of a run over local files."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from faulty_server import serve
from run_helpers import Values, before_step, losses

from minrnn.common.errors import UserError

FAULTS = ("status 500", "status 503", "status 429", "no answer", "reset", "cut", "cut late")


@pytest.mark.slow
def test_training_over_a_failing_server_ends_with_the_losses_of_local_files(
    values: Values,
    corpus: Path,
    run_recipe: Callable[[Values], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    texts = [json.loads(line)["text"] for line in corpus.open()]
    (tmp_path / "corpus").mkdir()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "corpus/words.parquet", row_group_size=2)
    values["data"]["corpus"] = str(tmp_path / "corpus/words.parquet")
    values["data"] |= {"validation": str(corpus), "shuffle_window": 2}
    values["train"]["steps"] = 48  # three times the corpus, more than a reader reads ahead at step 4
    expected = losses(run_recipe(values))
    values["data"] |= {"retries": 10, "retry_wait": 0.001, "timeout": 5.0}
    with serve(tmp_path / "corpus", FAULTS * 2) as server:
        values["data"]["corpus"] = server.url("words.parquet")
        values["run"]["dir"] = str(tmp_path / "disturbed")
        assert losses(run_recipe(values)) == expected

        # an outage that lasts: the run saves and exits, and goes on where it was
        values["run"]["dir"] = str(tmp_path / "stopped")
        values["train"]["save_every"] = None
        values["data"]["retries"] = 2
        with monkeypatch.context() as patched:
            before_step(patched, 4, lambda: setattr(server, "always", "status 503"))
            with pytest.raises(UserError, match=r"503 \(2 retries over"):
                run_recipe(values)
        (saved,) = (tmp_path / "stopped/checkpoints").iterdir()
        assert 4 <= int(saved.name.partition("-")[2]) < values["train"]["steps"]
        server.always = None
        server.faults.clear()
        assert losses(run_recipe(values)) == expected
