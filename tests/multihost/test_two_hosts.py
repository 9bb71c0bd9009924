"""A run on two hosts has the losses of one process, also when a host is lost.

`make test-multihost`, as root. Each host runs torchrun with one process, on CPUs over gloo. Both see the same
folder, as on a shared file system.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from namespaces import ADDRESSES, INTERFACE, Host, NoNamespacesError, two_hosts

pytestmark = pytest.mark.multihost
STEPS, SAVE_EVERY, LOST_AFTER = 240, 20, 90
# Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE, a restarted launcher waits for an address that was exchanged
# before its start (pytorch issue 135712).
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
LIMIT = 1200  # seconds; enough for a busy machine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a recipe: fp64 with dropout, two readers, so one or two processes."""
    folder = tmp_path_factory.mktemp("shared")
    draw = random.Random(0)
    words = "the state of a lane goes on where it was cut and no document sees another".split()
    texts = [" ".join(draw.choices(words, k=draw.choice([0, 1, 3, 10, 60]))) for _ in range(300)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.1},
        "data": {
            "corpus": str(folder / "words.jsonl"),
            "validation_fraction": 0.1,
            "validation_tokens": 300,
            "shuffle_window": 50,
            "workers": 0,
        },
        "batch": {"readers": 2, "lanes": 2, "chunk": 24},
        "optim": {"warmup_steps": 2},
        "train": {
            "precision": "fp64",
            "steps": STEPS,
            "log_every": 1,
            "save_every": SAVE_EVERY,
            "sample_tokens": 0,
            "peer_timeout": 20,
        },
        "tracking": {"uri": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def undisturbed(shared: Path) -> Path:
    """The folder of the run of a single process."""
    folder = shared / "undisturbed"
    command = [sys.executable, "-m", *training(shared, folder)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two machines, or a reason to skip."""
    try:
        with two_hosts(tmp_path) as pair:
            yield pair
    except NoNamespacesError as error:
        pytest.skip(str(error))


def training(shared: Path, folder: Path) -> list[str]:
    return ["minrnn.pipeline.train", "--config", str(shared / "recipe.yaml"), "--run.dir", str(folder)]


def launch(host: Host, shared: Path, folder: Path, nodes: str) -> subprocess.Popen[bytes]:
    """Start torchrun on a host, with one process; host-a is the rendezvous."""
    rendezvous = [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29400", "--rdzv-id", "run"),
        *("--rdzv-conf", "last_call_timeout=3,join_timeout=120", "--local-addr", ADDRESSES[host.name]),
    ]
    options = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "3"]
    torchrun = ["torch.distributed.run", *options, *rendezvous, "-m"]
    return host.start(sys.executable, "-m", *torchrun, *training(shared, folder), environment=ENVIRONMENT)


def entries(folder: Path) -> list[tuple[int, float]]:
    """(step, training loss) of each line."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def wait_for(condition: Callable[[], bool], event: str, hosts: tuple[Host, Host]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"{event} did not happen\n" + "\n".join(
            host.output()[-3000:] for host in hosts
        )
        time.sleep(0.05)


def check_same_run(folder: Path, undisturbed: Path) -> None:
    """Every step is there once, in order, with the losses and the data of the undisturbed run."""
    assert [step for step, _ in entries(folder)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(entries(folder), entries(undisturbed), rtol=1e-9)
    last = f"checkpoints/step-{STEPS:06d}"
    readers = sorted(path.name for path in (undisturbed / last).glob("reader-*.json"))
    assert len(readers) == 2
    for name in readers:
        assert json.loads((folder / last / name).read_text()) == json.loads(
            (undisturbed / last / name).read_text()
        )


def lose_in_the_middle(hosts: tuple[Host, Host], folder: Path) -> int:
    """Disconnect host-b in the middle of the run. Returns the last step before."""
    wait_for(lambda: len(entries(folder)) >= LOST_AFTER, f"step {LOST_AFTER}", hosts)
    hosts[1].disconnect()
    step = entries(folder)[-1][0]
    assert step < STEPS, "the run was over before a host was lost"
    return step


def test_two_hosts_give_the_losses_of_one_process(hosts: tuple[Host, Host], shared: Path, undisturbed: Path):
    folder = shared / "together"
    for process in [launch(host, shared, folder, "2") for host in hosts]:
        assert process.wait(LIMIT) == 0, "\n".join(host.output()[-3000:] for host in hosts)
    assert "2 processes" in hosts[0].output() + hosts[1].output()
    check_same_run(folder, undisturbed)


def test_a_host_is_lost_and_the_other_goes_on_alone(
    hosts: tuple[Host, Host], shared: Path, undisturbed: Path
):
    folder = shared / "alone"
    survivor, _ = [launch(host, shared, folder, "1:2") for host in hosts]
    step = lose_in_the_middle(hosts, folder)
    assert survivor.wait(LIMIT) == 0, hosts[0].output()[-5000:]
    output = hosts[0].output()
    assert "1 process " in output
    resumed = int(output.rsplit("going on from step ", 1)[1].split()[0])
    assert 0 < resumed <= step
    check_same_run(folder, undisturbed)


def test_a_host_is_lost_and_comes_back(hosts: tuple[Host, Host], shared: Path, undisturbed: Path):
    """With exactly two nodes, the other host waits for it."""
    folder = shared / "again"
    survivor, _ = [launch(host, shared, folder, "2") for host in hosts]
    step = lose_in_the_middle(hosts, folder)
    wait_for(lambda: "failed (exitcode: " in hosts[0].output(), "noticing", hosts)
    assert survivor.poll() is None
    assert entries(folder)[-1][0] <= step + 1, "nothing is trained without the other half of the data"
    hosts[1].connect()
    returned = launch(hosts[1], shared, folder, "2")
    for process in (survivor, returned):
        assert process.wait(LIMIT) == 0, "\n".join(host.output()[-5000:] for host in hosts)
    check_same_run(folder, undisturbed)
