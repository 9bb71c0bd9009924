"""Two hosts on one Linux machine: network namespaces with host names, connected by a virtual cable."""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = {"host-a": "10.213.7.1", "host-b": "10.213.7.2"}
INTERFACE = "cable"
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows NAME's folder of it as /etc


class NoNamespacesError(Exception):
    """This machine or this user cannot make network namespaces."""


def ip(*words: str) -> str:
    """Run `ip`; returns what it printed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """One of the two hosts."""

    name: str
    namespace: str
    logs: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on this host. Its output goes to a file in `logs`."""
        inside = [
            *("ip", "netns", "exec", self.namespace, "unshare", "--uts"),
            *("sh", "-c", 'hostname "$0" && exec "$@"', self.name),
            *command,
        ]
        with (self.logs / f"{self.name}.{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                inside, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.started.append(process)
        return process

    def output(self) -> str:
        """The output of all commands of this host."""
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.logs.glob(f"{self.name}.*.log"))
        )

    def disconnect(self) -> None:
        """Cut the connection, then kill all processes, so that no message about it arrives."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill()

    def connect(self) -> None:
        """Restore the connection."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "up")

    def kill(self) -> None:
        """Send SIGKILL to the processes of this host until there are none."""
        deadline = time.monotonic() + 20
        while (pids := ip("netns", "pids", self.namespace).split()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        for process in self.started:
            process.wait(20)


def _add(namespace: str) -> None:
    folder = HOSTS_FILES / namespace
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    )
    (folder / "resolv.conf").write_text("")
    ip("netns", "add", namespace)
    ip("-n", namespace, "link", "set", "lo", "up")


def _remove(host: Host) -> None:
    if host.namespace in ip("netns", "list").split():
        host.kill()
        ip("netns", "del", host.namespace)  # removes its end of the cable, too, and so the other end
    shutil.rmtree(HOSTS_FILES / host.namespace, ignore_errors=True)


@contextlib.contextmanager
def two_hosts(logs: Path) -> Iterator[tuple[Host, Host]]:
    """Yield host-a and host-b, which reach each other by name and no other host, and remove them afterwards.

    Raises:
        NoNamespacesError: the namespaces cannot be made.
    """
    if os.geteuid() != 0:
        raise NoNamespacesError("network namespaces need root")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        raise NoNamespacesError(f"{' and '.join(missing)} (iproute2, util-linux) not found")
    hosts = [Host(name, f"minrnn-{os.getpid()}-{name}", logs) for name in ADDRESSES]

    def clean_up() -> None:
        for host in hosts:
            _remove(host)
        with contextlib.suppress(OSError):  # not empty
            HOSTS_FILES.rmdir()

    atexit.register(clean_up)
    try:
        try:
            for host in hosts:
                _add(host.namespace)
            a, b = hosts
            ends = ["netns", a.namespace, "type", "veth", "peer", "name", INTERFACE, "netns", b.namespace]
            ip("link", "add", INTERFACE, *ends)
            for host in hosts:
                ip("-n", host.namespace, "address", "add", f"{ADDRESSES[host.name]}/24", "dev", INTERFACE)
                host.connect()
        except OSError as error:
            raise NoNamespacesError(str(error)) from error
        yield a, b
    finally:
        clean_up()
        atexit.unregister(clean_up)
