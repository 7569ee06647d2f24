"""The Hugging Face hub on this machine, as far as pushing and fetching a model repository goes: what the real client
asks for, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories with one branch each; whoever asks may read and write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        """Method and path of every request."""
        self.lost: set[str] = set()
        """Files that are listed and not to be had."""


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment] # the only server that it is made for
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._asked(), self.rfile.read(int(self.headers["Content-Length"]))
        match path:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
                self.server.repositories.setdefault(name, {})
                self._answer({"url": f"{self.server.endpoint}/{name}"})
            case ["api", "validate-yaml"]:
                self._answer({})
            case ["api", "models", user, name, "preupload", _]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            case ["api", "models", user, name, "commit", _]:
                repository = self.server.repositories[f"{user}/{name}"]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = _commit(repository)
                self._answer(
                    {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{user}/{name}/commit/{commit}"}
                )
            case _:
                self._refuse("EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self._asked():
            case ["api", "models", user, name, *rest] if f"{user}/{name}" in self.server.repositories:
                repository = self.server.repositories[f"{user}/{name}"]
                if rest[:1] == ["tree"]:
                    self._answer(
                        [
                            {"type": "file", "path": path, "size": len(content), "oid": _hash(content)}
                            for path, content in repository.items()
                        ]
                    )
                else:
                    self._answer({"id": f"{user}/{name}", "sha": _commit(repository)})
            case [user, name, "resolve", _, *path] if f"{user}/{name}" in self.server.repositories:
                repository = self.server.repositories[f"{user}/{name}"]
                file, commit = "/".join(path), {"X-Repo-Commit": _commit(repository)}
                if file in repository and file not in self.server.lost:
                    self._send(200, repository[file], ETag=f'"{_hash(repository[file])}"', **commit)
                else:
                    self._refuse("EntryNotFound", **commit)
            case _:
                self._refuse("RepoNotFound")

    def _asked(self) -> list[str]:
        self.server.asked.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _answer(self, tree: Any) -> None:
        self._send(200, json.dumps(tree).encode())

    def _refuse(self, code: str, **headers: str) -> None:
        self._send(404, b"", **{"X-Error-Code": code, **headers})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(repository: dict[str, bytes]) -> str:
    return _hash(repr(sorted(repository.items())).encode())
