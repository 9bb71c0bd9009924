"""A Hugging Face hub on this machine, for tests: the requests that huggingface_hub sends to push a model and
to load it back. Everything is in memory. A commit is applied whole or not at all, as on the hub.

    with LocalHub() as hub:
        hub.url                 HF_ENDPOINT for clients (with HF_HUB_DISABLE_XET=1)
        hub.files("me/model")   {path: bytes} of a branch's newest commit
        hub.fault = ...         called before each request; may break it

Not here: xet, multipart uploads, pull requests, datasets' files, and the hub's checks of metadata.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
USER = "me"
LFS_SUFFIXES = (".safetensors", ".png", ".bin")  # those of the hub's .gitattributes that tests use
Tree = dict[str, str]  # the SHA-256 of each file, by path


@dataclass
class Repository:
    """A model's commits, oldest first, and its branches."""

    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        """Make a commit the newest of a branch; returns its id."""
        content = json.dumps([tree, message, len(self.commits)])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        """The commit that a branch or a commit id names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class LocalHub:
    """The server, from `__enter__` to `__exit__`.

    Attributes:
        fault: called with method and path before each request. A number is the status to answer with, 0
            closes the connection without an answer, None lets the request through.
        requests: method and path of every request.
        uploads: sizes of the large files that were sent.
        licences: the licences of datasets, by name.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[int] = []
        self.licences: dict[str, str] = {}
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str = WRITE_TOKEN) -> dict[str, str]:
        """The environment variables of a client."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without those that it is created with."""
        with self.lock:
            repository = self.repositories[name]
            tree = repository.commits[repository.branches[revision]]
            return {path: self.blobs[oid] for path, oid in tree.items() if path != ".gitattributes"}

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        """Make a repository with these files."""
        repository = self.repositories[name] = Repository(private)
        tree = {path: self.store(content) for path, content in (files or {}).items()}
        repository.commit("main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n"), **tree}, "")
        return repository

    def store(self, content: bytes) -> str:
        """Keep a file's content; returns its SHA-256."""
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        quoted = urlsplit(self.path).path
        path = unquote(quoted)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        self.hub.requests.append((self.command, path))
        status = self.hub.fault(self.command, path)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self._error(status, "", "a fault of the test")
            return
        with self.hub.lock:
            self._route(quoted, body)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str, body: bytes) -> None:
        """Answer. The path is quoted, since the name of a branch may hold a slash."""
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and method == self.command.replace("HEAD", "GET"):
                needs_write = method != "GET" and function is not _Handler._validate
                if needs_write and not path.startswith("/lfs/") and self._role() != "write":
                    self._error(403 if self._role() else 401, "", "this token has no right to write")
                    return
                function(self, body, **{name: unquote(value) for name, value in match.groupdict("").items()})
                return
        self._error(404, "", f"{self.command} {path} is not there")

    def _role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {WRITE_TOKEN: "write", READ_TOKEN: "read"}.get(token)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Code": code} if code else {}
        content = b"" if self.command == "HEAD" else json.dumps({"error": message}).encode()
        self._send(content, status, X_Error_Message=message, **headers)

    def _repository(self, name: str) -> Repository | None:
        """The repository; None after the answer that there is none, as for one that this token may not
        read."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._role() is None):
            self._error(404 if self._role() else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _whoami(self, body: bytes) -> None:
        role = self._role()
        if role is None:
            self._error(401, "", "Invalid credentials in Authorization header")
        else:
            token = {"displayName": "test", "role": role}
            self._json({"name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def _create(self, body: bytes) -> None:
        values = json.loads(body)
        name = f"{values.get('organization') or USER}/{values['name']}"
        if not name.startswith(f"{USER}/"):
            self._error(403, "", f"You don't have the rights to create a model under {name.split('/')[0]}")
        elif values["name"].endswith("refused"):
            self._error(400, "", "Invalid repo name: refused")
        elif name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": name}, 409)
        else:
            self.hub.create(name, values.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if revision in repository.branches:
            self._error(409, "", "Reference already exists")
            return
        repository.branches[revision] = repository.branches["main"]
        self._json({})

    def _auth_check(self, body: bytes, name: str) -> None:
        if self._repository(name) is None:
            return
        if self.path.endswith("/write") and (self._role() != "write" or not name.startswith(f"{USER}/")):
            self._error(403, "", "Forbidden: this token has no right to write")
            return
        self._json({})

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        try:
            yaml.safe_load(content.split("---")[1])
        except (IndexError, yaml.YAMLError) as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        sha, files = repository.sha(revision), []
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith(LFS_SUFFIXES)
            oid = repository.commits[sha].get(file["path"])
            if oid is not None and not is_large:
                content = self.hub.blobs[oid]
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _lfs_batch(self, body: bytes, name: str) -> None:
        objects = [
            {"oid": item["oid"], "size": item["size"]}
            if item["oid"] in self.hub.blobs
            else {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, "", "the content is not that of the object")
            return
        self.hub.uploads.append(len(body))
        self.hub.store(body)
        self._json({})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent = repository.branches.get(revision)
        if parent is None or header.get("parentCommit", parent) != parent:
            self._error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        tree = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.blobs:
                tree[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile" and value["path"] in tree:
                del tree[value["path"]]
            else:
                self._error(400, "", f"{line['key']} of {value['path']} cannot be done")
                return
        sha = repository.commit(revision, tree, header["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (sha := repository.sha(revision or "main")) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        values = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": []}
        self._json({**values, "siblings": siblings, "downloads": 0, "likes": 0})

    def _dataset(self, body: bytes, name: str, revision: str | None = None) -> None:
        if name not in self.hub.licences:
            self._error(404, "RepoNotFound", "Repository not found")
            return
        card = {"license": self.hub.licences[name]}
        self._json({"id": name, "sha": "0" * 40, "tags": [], "cardData": card, "siblings": []})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (sha := repository.sha(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        entries = []
        for path, oid in repository.commits[sha].items():
            entry = {"type": "file", "path": path, "oid": oid[:40], "size": len(self.hub.blobs[oid])}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": oid, "size": entry["size"], "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        sha = repository.sha(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif path not in repository.commits[sha]:
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            oid = repository.commits[sha][path]
            self._send(self.hub.blobs[oid], ETag=f'"{oid}"', X_Repo_Commit=sha)


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", f"/api/models/{NAME}/auth-check(/write)?", _Handler._auth_check),
    ("POST", f"/api/models/{NAME}/branch/{REVISION}", _Handler._branch),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", _Handler._preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", _Handler._commit),
    ("GET", f"/api/models/{NAME}", _Handler._info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", _Handler._info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}(/.*)?", _Handler._tree),
    ("GET", f"/api/datasets/{NAME}(/revision/{REVISION})?", _Handler._dataset),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._lfs_upload),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", _Handler._resolve),
]
