"""Two hosts on one Linux machine: network namespaces with host names of their own, joined by a virtual cable that leads nowhere else."""

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
    """This machine, or this user, cannot make network namespaces; says why."""


def ip(*words: str) -> str:
    """Run `ip`; returns what it printed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """A machine of a network of two."""

    name: str
    namespace: str
    logs: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command here; its output goes to a file of `logs`."""
        inside = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0" && exec "$@"',
            self.name,
            *command,
        ]
        with (self.logs / f"{self.name}.{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                inside, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.started.append(process)
        return process

    def told(self) -> str:
        """Everything that was printed here."""
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.logs.glob(f"{self.name}.*.log"))
        )

    def lose(self) -> None:
        """Pull the cable, then kill everything: nobody hears of it."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill()

    def come_back(self) -> None:
        """Plug the cable in."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "up")

    def kill(self) -> None:
        """kill -9 for every process of this host, until there is none."""
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
        ip("netns", "del", host.namespace)  # and its end of the cable, and with it the other
    shutil.rmtree(HOSTS_FILES / host.namespace, ignore_errors=True)


@contextlib.contextmanager
def two_hosts(logs: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, who reach each other by name and nothing else; gone afterwards, with everything that runs there.

    Raises:
        NoNamespacesError: they cannot be made here.
    """
    if os.geteuid() != 0:
        raise NoNamespacesError("network namespaces want root")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        raise NoNamespacesError(f"{' and '.join(missing)} (iproute2, util-linux) not found")
    hosts = [Host(name, f"minrnn-{os.getpid()}-{name}", logs) for name in ADDRESSES]

    def clean_up() -> None:
        for host in hosts:
            _remove(host)
        with contextlib.suppress(OSError):  # others may have theirs
            HOSTS_FILES.rmdir()

    atexit.register(clean_up)
    try:
        try:
            for host in hosts:
                _add(host.namespace)
            a, b = hosts
            ip(
                "link",
                "add",
                INTERFACE,
                "netns",
                a.namespace,
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                b.namespace,
            )
            for host in hosts:
                ip("-n", host.namespace, "address", "add", f"{ADDRESSES[host.name]}/24", "dev", INTERFACE)
                host.come_back()
        except OSError as error:
            raise NoNamespacesError(str(error)) from error
        yield a, b
    finally:
        clean_up()
        atexit.unregister(clean_up)
