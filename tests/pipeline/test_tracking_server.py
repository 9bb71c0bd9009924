"""The mirror in a real `mlflow server` over HTTP: each step once, whatever is killed, refused or deleted."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, artifacts
from run_helpers import Values, losses, recipe_file
from tracking_helpers import SECONDS, Warnings, check_mirrored, runs_of, wait_for, write_lines
from transformers import AutoModelForCausalLM

from minrnn.pipeline.tracking import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("an_answer_may_take_long")]
# Waits before every hundredth step until the test allows it.
GATED = """
import sys, time
from pathlib import Path
from minrnn.pipeline import loop, train

original = loop.take_step

def take_step(run, number, *rest):
    while number % 100 == 0 and not (Path(sys.argv[1]) / f"go-{number}").exists():
        time.sleep(0.02)
    return original(run, number, *rest)

loop.take_step = take_step
train.main(sys.argv[2:])
"""


class Server:
    """An `mlflow server` on a database and a port of its own."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **off}  # ten processes of the server that nothing here needs
        with (self.folder / "server.log").open("a") as log:
            self.process: Any = subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=log, start_new_session=True, env=environment
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(empty_database: Path, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    started = Server(tmp_path / "server")
    (started.folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    started.start()
    yield started
    started.kill()


def test_each_step_is_there_once_after_kills_of_the_server_and_of_the_run(
    values: Values, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """500 logged steps, three restarts of the server, two kills of the run; then the model is registered."""
    values["tracking"] = {"uri": server.url, "experiment": "tests", "register": "tiny"}
    values["train"] |= {"steps": 500, "eval_every": 250, "save_every": 30}
    command = [sys.executable, "-c", GATED, str(tmp_path), "--config", str(recipe_file(values, tmp_path))]
    folder = Path(values["run"]["dir"])

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stderr=(tmp_path / "log").open("ab"), env=environment)

    def wait_for_gate(step: int) -> None:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and (step - 1 in dict(losses(folder)[-1:])))

    def open_gate(step: int) -> None:
        (tmp_path / f"go-{step}").touch()

    run = start()
    wait_for_gate(100)
    server.kill()
    open_gate(100)
    wait_for_gate(200)  # a hundred steps without a server
    server.start()
    run.send_signal(signal.SIGKILL)
    run.wait()
    run = start()
    wait_for_gate(200)  # goes on from a checkpoint before
    open_gate(200)
    wait_for_gate(300)
    server.kill()
    server.start()
    open_gate(300)
    wait_for_gate(400)
    run.send_signal(signal.SIGKILL)
    server.kill()
    run.wait()
    server.start()
    open_gate(400)
    open_gate(500)
    assert start().wait(SECONDS) == 0
    assert start().wait(SECONDS) == 0  # sends what may be missing
    tracked = check_mirrored(folder, server.url)
    assert [step for step, _ in losses(folder)] == list(range(1, 501))
    assert [run.info.run_id for run in runs_of(server.url)] == [tracked.info.run_id]
    assert tracked.info.status == "FINISHED"
    client = MlflowClient(tracking_uri=server.url)
    system = client.get_metric_history(tracked.info.run_id, "system/cpu_utilization_percentage")
    assert len({metric.step for metric in system}) == len(system)
    (version,) = client.search_model_versions("name = 'tiny'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    model = artifacts.download_artifacts(f"models:/tiny/{version.version}", dst_path=str(tmp_path / "copy"))
    assert AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).config.hidden_size == 16


@pytest.fixture
def unreliable(server: Server) -> Iterator[str]:
    """The URL of a proxy that fails one of two requests that log metrics: with 500 or 429 before they reach
    the server, or with 500 or nothing instead of its answer."""
    draw = random.Random(0)

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            logs_metrics = self.path.endswith("log-batch") and b'"metrics"' in body
            fault = draw.choice(["500", "429", "lost", "late 500", *[""] * 4]) if logs_metrics else ""
            if fault in ("500", "429"):
                self.send_error(int(fault))
                return
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self.close_connection = True
            elif fault:
                self.send_error(500)
            else:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = forward

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()


def test_each_step_is_there_once_if_requests_fail(
    unreliable: str, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """And a warning says so once."""
    from minrnn.pipeline import tracking

    monkeypatch.setattr(tracking, "BATCH_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "MAX_METRICS", 20)
    monkeypatch.setattr(tracking, "MAX_PAUSE", 1.0)
    warnings = Warnings()
    tracker = Tracker(folder, unreliable, "tests", {}, warnings)
    for first in range(1, 121, 20):
        write_lines(folder, *range(first, first + 20))
        tracker.notify()

        def has_all(last: int = first + 18) -> bool:
            return any(run.data.metrics.get("train/tokens", 0) >= 10 * last for run in runs_of(server.url))

        wait_for(has_all)
    for _ in range(50):  # as starts of the run do
        tracker.close("FINISHED")
        if check_status(server.url) == "FINISHED":
            break
        tracker = Tracker(folder, unreliable, "tests", {}, warnings)
    check_mirrored(folder, unreliable)
    assert len([line for line in warnings if "training goes on" in line]) >= 1


def check_status(url: str) -> str:
    return runs_of(url)[0].info.status


def test_an_experiment_that_is_deleted_meanwhile_gets_a_successor(server: Server, folder: Path):
    warnings = Warnings()
    tracker = Tracker(folder, server.url, "tests", {}, warnings)
    write_lines(folder, 1, 2, 3)
    tracker.notify()
    wait_for(lambda: any("train/loss" in run.data.metrics for run in runs_of(server.url)))
    (run,) = runs_of(server.url)
    MlflowClient(tracking_uri=server.url).delete_experiment(run.info.experiment_id)
    write_lines(folder, 4, 5, 6)
    tracker.notify()
    wait_for(lambda: len(runs_of(server.url, "tests-2")) == 1)
    tracker.close("FINISHED")
    check_mirrored(folder, server.url)
    assert any("the MLflow experiment tests was deleted; the run is in tests-2" in line for line in warnings)
