"""A Hugging Face hub on loopback: real HTTP, the endpoints that huggingface_hub uses, two origins.

The hub's origin answers the API and small files and redirects weights to a second origin, as the
hub does to its CDN, which must never see the token. Every answer is counted; connections can be
told to break in the middle of a body.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_for_tests"


@dataclass(frozen=True)
class Request:
    """One answered request."""

    origin: str
    method: str
    path: str
    token: str
    range: str
    body_bytes: int


@dataclass
class Repo:
    """A model: one folder a commit, branches that name commits."""

    commits: dict[str, Path]
    branches: dict[str, str]
    gated: bool = False


@dataclass
class Lookalike:
    """What tests change and read."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    """Bodies of weights end after so many bytes, one entry an answer, until the list is empty."""
    ranges: bool = True
    """Whether the CDN knows byte ranges."""

    def body_bytes(self, what: str = "") -> int:
        """Bytes of bodies sent for paths that contain `what`."""
        return sum(request.body_bytes for request in self.requests if what in request.path)


@contextmanager
def running_hub() -> Iterator[Lookalike]:
    """Both origins, up until the block ends."""
    hub = Lookalike()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, origin)) for origin in ("hub", "cdn")]
    hub.endpoint = f"http://127.0.0.1:{servers[0].server_port}"
    # Another name is another origin for a client, whatever the port.
    cdn = f"http://localhost:{servers[1].server_port}"
    for server in servers:
        server.cdn = cdn  # type: ignore[attr-defined]
        server.daemon_threads = True
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


def _handler(hub: Lookalike, origin: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if origin == "cdn":
                model, commit, name = re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path).groups()  # type: ignore[union-attr]
                self._send_file(hub.repos[model].commits[commit] / name, {}, weights=True)
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                self._api(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path):
                self._resolve(*found.groups())
            else:
                self._fail(404, "Unknown")

        def _repo(self, model: str, revision: str | None) -> tuple[Repo, str] | None:
            repo = hub.repos.get(model)
            if repo is None:
                # The hub does not tell strangers whether a name exists.
                self._fail(401, "RepoNotFound")
                return None
            if repo.gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
                self._fail(401, "GatedRepo")
                return None
            commit = repo.branches.get(revision or "main", revision or "")
            if commit not in repo.commits:
                self._fail(404, "RevisionNotFound")
                return None
            return repo, commit

        def _api(self, model: str, kind: str | None, revision: str | None) -> None:
            found = self._repo(model, revision)
            if found is None:
                return
            repo, commit = found
            files = sorted(path for path in repo.commits[commit].iterdir() if path.is_file())
            if kind == "tree":
                body: Any = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)} for p in files]
            else:
                body = {"id": model, "sha": commit, "siblings": [{"rfilename": path.name} for path in files]}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _resolve(self, model: str, revision: str, name: str) -> None:
            found = self._repo(model, revision)
            if found is None:
                return
            repo, commit = found
            path = repo.commits[commit] / name
            headers = {"X-Repo-Commit": commit}
            if not path.is_file():
                self._fail(404, "EntryNotFound", headers)
            elif name.endswith(".safetensors"):
                headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{_etag(path)}"'}
                headers["Location"] = f"{self.server.cdn}/cdn/{model}/{commit}/{name}"  # type: ignore[attr-defined]
                self._send(302, b"", headers)
            else:
                self._send_file(path, headers, weights=False)

        def _send_file(self, path: Path, headers: dict[str, str], weights: bool) -> None:
            size, status, start, end = path.stat().st_size, 200, 0, path.stat().st_size - 1
            headers = {**headers, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if asked and hub.ranges:
                start, end, status = int(asked[1]), min(int(asked[2] or size - 1), size - 1), 206
                if start > end:
                    self._fail(416, "Range")
                    return
                headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(end + 1 - start)
            stop = hub.break_after.pop(0) if weights and hub.break_after and self.command == "GET" else None
            self._send(status, content, headers, stop)

        def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

        def _send(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = 0
            try:
                if self.command == "GET":
                    for at in range(0, len(body) if stop is None else min(stop, len(body)), 65536):
                        piece = body[at : min(at + 65536, len(body) if stop is None else stop)]
                        self.wfile.write(piece)
                        sent += len(piece)
            except OSError:
                self.close_connection = True  # the client took what it wanted
            if stop is not None:
                self.close_connection = True
            hub.requests.append(
                Request(
                    origin,
                    self.command,
                    unquote(self.path),
                    self.headers.get("authorization", ""),
                    self.headers.get("range", ""),
                    sent,
                )
            )

    return Handler


@cache
def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
