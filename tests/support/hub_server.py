"""A small Hub on this machine: what the real `huggingface_hub` client needs for downloads and uploads, and faults.

Repositories live in memory. Every request is written down, so that a test can say what was asked and with which token.
The large-file protocol is LFS's (a client is told to leave Xet out with HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".gguf", ".bin")
READ, WRITE = "hf_read", "hf_write"
"""Tokens of the user `tester`; `hf_other` belongs to nobody who was let in."""
OTHER, FINE = "hf_other", "hf_fine"
ROLES = {READ: "read", WRITE: "write", OTHER: "read", FINE: "fineGrained"}


@dataclass
class Repo:
    """One repository."""

    kind: str = "models"
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    private: bool = False
    gate: str | None = None
    """``ask`` (the user has not asked), ``pending``, ``scope`` (the token may not); None: open."""
    moved_to: str | None = None
    broken_off: dict[str, int] = field(default_factory=dict)
    """File → bytes after which the connection is dropped."""
    num_breaks: int = 1
    """How often that happens."""


@dataclass
class HubServer:
    """The running server."""

    address: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and token of every request."""
    lfs: dict[str, bytes] = field(default_factory=dict)
    num_failing_commits: int = 0

    def environment(self, cache: object, token: str | None = None) -> dict[str, str]:
        """Return the variables with which a client talks to this server, with an empty cache."""
        made = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return made | ({} if token is None else {"HF_TOKEN": token})

    def asked(self, method: str, part: str) -> list[str]:
        """Return the paths of requests by method that hold ``part``."""
        return [path for found, path, _ in self.requests if found == method and part in path]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a Hub for a while."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = HubServer(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.token))
        for method, pattern, handle in _ROUTES:
            if (match := re.fullmatch(pattern, path)) and self.command in method.split():
                if self.token and self.token not in ROLES and "/lfs/" not in path:
                    self._refuse(401, "Invalid credentials in Authorization header")
                else:
                    handle(self, **match.groupdict())
                return
        self._refuse(404, f"no route {self.command} {path}")

    # ------------------------------------------------------------------------------------------------- answers

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({} if code is None else {"X-Error-Code": code})
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})

    def _repo(self, kind: str, name: str) -> Repo | None:
        """Return a repository that this token may read; otherwise answer as the Hub does."""
        repo = self.hub.repos.get(name)
        if repo is None or repo.kind != kind or (repo.private and not self.token):
            if self.token:
                self._refuse(404, "Repository not found", "RepoNotFound")
            else:
                self._refuse(401, "Invalid username or password.", "RepoNotFound")
            return None
        if repo.moved_to is not None:
            self._send(307, headers={"Location": self.path.replace(name, repo.moved_to, 1)})
            return None
        if repo.gate is not None:
            page = f"{self.hub.address}/{name}"
            if not self.token:
                self._refuse(401, f"Access to model {name} is restricted. You must be authenticated.", "GatedRepo")
            elif repo.gate == "pending":
                self._refuse(
                    403,
                    f"Your request to access model {name} is awaiting a review from the repo authors.",
                    "GatedRepo",
                )
            elif repo.gate == "scope":
                self._refuse(
                    403,
                    "Please enable access to public gated repositories in your fine-grained token settings to view "
                    "this repository.",
                    "GatedRepo",
                )
            else:
                self._refuse(
                    403,
                    f"Access to model {name} is restricted and you are not in the authorized list. Visit {page} to ask "
                    "for access.",
                    "GatedRepo",
                )
            return None
        return repo

    # -------------------------------------------------------------------------------------------------- reading

    def whoami(self) -> None:
        if self.token not in ROLES:
            self._refuse(401, "Invalid username or password.")
            return
        self._json({"name": "tester", "type": "user", "auth": {"accessToken": {"role": ROLES[self.token]}}})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._has(repo, revision):
            return
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        self._json({"id": name, "sha": repo.commits[-1], "private": repo.private, "siblings": siblings, "tags": []})

    def auth_check(self, kind: str, name: str) -> None:
        if self._repo(kind, name) is not None:
            self._json({})

    def tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._has(repo, revision):
            return
        entries = []
        for file, content in sorted(repo.files.items()):
            entry: dict = {"type": "file", "path": file, "size": len(content), "oid": _git_oid(content)}
            if file.endswith(LFS_ENDINGS):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _has(self, repo: Repo, revision: str) -> bool:
        if revision in ("main", *repo.commits):
            return True
        self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return False

    def resolve(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._has(repo, revision):
            return
        if path not in repo.files:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        content = repo.files[path]
        headers = {
            "ETag": f'"{_sha256(content) if path.endswith(LFS_ENDINGS) else _git_oid(content)}"',
            "X-Repo-Commit": repo.commits[-1],
            "Accept-Ranges": "bytes",
        }
        start, end, status = 0, len(content), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            end = min(end, int(found[2]) + 1) if found[2] else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        cut = repo.broken_off.get(path)
        if self.command == "GET" and cut is not None and repo.num_breaks > 0:
            repo.num_breaks -= 1
            self.send_response(status)
            for key, value in {"Content-Length": str(end - start), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start : start + cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._send(status, content[start:end], headers)

    # -------------------------------------------------------------------------------------------------- writing

    def _may_write(self) -> bool:
        if ROLES.get(self.token) == "write":
            return True
        if not self.token:
            self._refuse(401, "Invalid username or password.")
        else:
            self._refuse(403, 'You don\'t have the rights to create a model under the namespace "tester"')
        return False

    def create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        if name in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(kind=kind, private=private)
        self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._may_write():
            return
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            old = repo.files.get(file["path"])
            oid = None if old is None else (_sha256(old) if mode == "lfs" else _git_oid(old))
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, name: str) -> None:
        if not self._may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry: dict = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert _sha256(self.body) == oid
        self.hub.lfs[oid] = self.body
        self._send(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._may_write():
            return
        if self.hub.num_failing_commits > 0:
            self.hub.num_failing_commits -= 1
            self._refuse(500, "Internal error")
            return
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                repo.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                repo.files[item["value"]["path"]] = self.hub.lfs[item["value"]["oid"]]
            elif item["key"] == "deletedFile":
                repo.files.pop(item["value"]["path"], None)
        repo.commits.append(f"{len(repo.commits):040x}")
        self._json(
            {"success": True, "commitOid": repo.commits[-1], "commitUrl": f"{self.hub.address}/{name}/commit/main"}
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_KIND = r"(?P<kind>models|datasets)"
_NAME = r"(?P<name>[\w.-]+(/[\w.-]+)?)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/{_KIND}/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/{_KIND}/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"/api/{_KIND}/{_NAME}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", _Handler.tree),
    ("GET", f"/api/{_KIND}/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/{_KIND}/{_NAME}/auth-check", _Handler.auth_check),
    ("GET", f"/api/{_KIND}/{_NAME}", _Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    ("HEAD GET", f"/(?P<kind>datasets)/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD GET", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
