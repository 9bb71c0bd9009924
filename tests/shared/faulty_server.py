"""A web server on localhost that serves a folder with range requests, and fails where a test says so."""

import contextlib
import email.utils
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("status 500", "status 503", "status 429", "no answer", "reset", "cut", "cut late", "stall")
LOGIN = b"<!doctype html><html><head><title>Sign in</title></head><body></body></html>"


@dataclass
class FaultyServer:
    """What a server of this module serves and how it fails."""

    root: Path
    faults: deque[str] = field(default_factory=deque)
    """Each request for a file takes the first of these away and fails accordingly."""
    always: str | None = None
    """A fault of every request for a file."""
    retry_after: str = "0"
    password: str | None = None
    """Value of the Authorization header that every request needs."""
    has_ranges: bool = True
    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request for a file."""
    bytes_sent: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, served: FaultyServer, *args):
        self.served = served
        super().__init__(*args)

    def log_message(self, format, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = self.served.root / path.lstrip("/")
        if self.served.password is not None and self.headers.get("Authorization") != self.served.password:
            self.answer(401, b"who are you?")
        elif file.is_dir():
            names = sorted(f"{child.name}/" if child.is_dir() else child.name for child in file.iterdir())
            links = "".join(f'<a href="{name}">{name}</a>' for name in names)
            self.answer(
                200, f'<a href="?C=N;O=D">Name</a> <a href="../">up</a> {links}'.encode(), "text/html"
            )
        elif not file.is_file():
            self.answer(404, b"nothing here")
        else:
            self.served.requests.append((path, self.headers.get("Range", "")))
            fault = self.served.always
            with contextlib.suppress(IndexError):
                fault = self.served.faults.popleft()
            self.send_file(file, fault)

    def send_file(self, file: Path, fault: str | None) -> None:
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(span[1]), int(span[2] or len(data) - 1) + 1) if span else (0, len(data))
        body, headers = data[start:end], {"ETag": f'"{len(data)}-{file.stat().st_mtime_ns}"'}
        if fault == "html":
            self.answer(200, LOGIN, "text/html; charset=utf-8")
        elif fault is not None and fault.startswith("status"):
            self.answer(int(fault.split()[1]), b"not now", headers={"Retry-After": self.served.retry_after})
        elif fault == "no answer":
            self.close_connection = True
        elif fault == "reset":
            self.reset()
        elif span and self.served.has_ranges and start >= len(data):
            self.answer(416, b"", headers=headers | {"Content-Range": f"bytes */{len(data)}"})
        else:
            if span and self.served.has_ranges:
                headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
                status = 206
            else:
                status, body = 200, data
            self.answer(status, body, "application/octet-stream", headers, fault)

    def answer(
        self,
        status: int,
        body: bytes,
        kind: str = "text/plain",
        headers: dict | None = None,
        fault: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        size = {"cut": len(body) // 2, "stall": len(body) // 3, "cut late": len(body) - 1}.get(
            fault or "", len(body)
        )
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:size])
            self.served.bytes_sent += size
        if fault == "stall":
            self.served.stopped.wait(30)
        if size < len(body):
            self.close_connection = True

    def reset(self) -> None:
        """Close the connection with a RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = open("/dev/null", "wb")  # noqa: SIM115 - the handler flushes it


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass


@contextlib.contextmanager
def serve(root: Path, faults: Iterable[str] = ()) -> Iterator[FaultyServer]:
    """Serve a folder until the end of the context."""
    served = FaultyServer(root, deque(faults))
    server = Quiet(("127.0.0.1", 0), partial(Handler, served))
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.stopped.set()
        server.shutdown()
        server.server_close()


def http_date(seconds: float) -> str:
    return email.utils.formatdate(seconds, usegmt=True)
