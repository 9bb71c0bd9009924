"""Outages of the hub, without a network."""

import time
from pathlib import Path

import datasets
import pytest
from data_helpers import reading_error
from faulty_server import serve

from minrnn.data import CorpusSpec, RetryPolicy
from minrnn.data.hub_network import retried_rows, retry_outages
from minrnn.data.outages import RemoteError

FAST = RetryPolicy(retries=3, timeout=0.5, first_wait=0.001)


@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError()])
def test_a_streamed_dataset_goes_on_at_the_row_that_failed(error: Exception):
    fails_before = {0, 1, 7, 8, 30}

    def rows(numbers: list[int]):
        for number in numbers:
            if number in fails_before:
                fails_before.remove(number)
                raise error
            yield {"text": str(number)}

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(range(40))})
    texts = [row["text"] for row in retried_rows(dataset, "name", FAST)]
    assert texts == [str(number) for number in range(40)]
    assert not fails_before


def test_an_outage_that_lasts_is_an_error(tmp_path: Path):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("gone")

    dataset = datasets.IterableDataset.from_generator(rows)
    reading = retried_rows(dataset, "name", FAST)
    assert next(reading) == {"text": "a"}
    with pytest.raises(RemoteError, match=r"name cannot be read: .*gone.* \(3 retries over"):
        next(reading)


def test_opening_is_tried_again_unless_the_error_cannot_pass():
    calls = []

    def fails(error: Exception, times: int):
        calls.append(error)
        if len(calls) <= times:
            raise error
        return "opened"

    assert retry_outages(lambda: fails(ConnectionError("reset"), 2), "name", FAST) == "opened"
    calls.clear()
    with pytest.raises(FileNotFoundError):
        retry_outages(lambda: fails(FileNotFoundError("gone"), 9), "name", FAST)
    assert len(calls) == 1


@pytest.mark.parametrize("status", [404, 500])
def test_a_mistyped_path_is_not_waited_for(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "corpus.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path / "nothing") as hub:
        if status == 500:
            hub.root = tmp_path
            monkeypatch.setattr("faulty_server.Handler.answer", answer_500)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url().rstrip("/"))
        start = time.monotonic()
        error = reading_error(CorpusSpec("corpus"))
    assert time.monotonic() - start < 20
    assert "there is no file or folder corpus in" in error
    assert "(did you mean corpus.txt?)" in error
    expected = "no dataset of that name on the hub" if status == 404 else "the hub cannot be asked"
    assert expected in error


def answer_500(self, status, body, *args, **kwargs) -> None:
    self.send_response(500)
    self.send_header("Content-Length", "0")
    self.end_headers()


def test_an_unreachable_hub_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    error = reading_error(CorpusSpec("mistyped"))
    assert time.monotonic() - start < 20
    assert "there is no file or folder mistyped in" in error
    assert "the hub cannot be asked" in error
    assert "write a path in full, a dataset as USER/NAME" in error


def test_an_outage_of_the_hub_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = reading_error(CorpusSpec("user/name", network=FAST))
    assert "the hub cannot be asked for a dataset of that name: the connection fails" in error
    assert "waiting for the dataset user/name: the connection fails" in capfd.readouterr().err
