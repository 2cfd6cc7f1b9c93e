"""A small Hugging Face Hub on this machine: the part of its HTTP interface that data sets need.

The real clients (``datasets``, ``huggingface_hub``) talk to it where ``HF_ENDPOINT`` names its address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a" * 34  # of the user "ada", who may write to her own data sets


@dataclass
class Repository:
    """A data set: its commits in order, each with all its files by path."""

    commits: list[dict[str, bytes]] = field(default_factory=list)
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)
    branches: set[str] = field(default_factory=lambda: {"main"})  # all of them name the newest commit

    def sha(self, number: int = -1) -> str:
        """The hash of a commit."""
        position = range(len(self.commits))[number]
        text = repr((position, sorted(self.commits[position].items())))
        return hashlib.sha1(text.encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of the commit that a revision names."""
        for number in range(len(self.commits)):
            if self.sha(number) == revision:
                return revision, self.commits[number]
        return (self.sha(), self.commits[-1]) if revision in self.branches else None


@dataclass
class Hub:
    """A Hub with its repositories, and what was asked of it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def add(self, name: str, files: dict[str, bytes | str], **options: Any) -> Repository:
        """Adds a commit to the data set ``name``, which is made if it is not there."""
        repository = self.repositories.setdefault(name, Repository(**options))
        repository.commits.append(
            {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        )
        return repository

    def environment(self, cache: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The variables with which the real clients talk to this Hub, and keep nothing of the user's own."""
        own = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }
        without = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"}
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "cli", ROOT / "tests")))
        kept = {name: value for name, value in os.environ.items() if name not in without}
        return {**kept, "PYTHONPATH": paths, **own}

    def run(self, code: str, cache: Path, token: str | None = None, **more: str) -> str:
        """What a script prints that talks to this Hub, in a process of its own."""
        environment = self.environment(cache, token, **more)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=cache)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Keeps the console quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        address = urlsplit(self.path)
        self.asked, self.query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append(f"{self.command} {self.asked}")
        if self.asked.startswith(("/api/repos", "/api/whoami", "/api/validate")):
            self._account()
            return
        found = re.match(r"/(?:api/)?datasets/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?$", self.asked)
        repository = self.hub.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not self._logged_in()):
            self._error(401 if not self._logged_in() else 404, "RepoNotFound", "Repository not found")
            return
        name, action, revision, path = found[1], found[2] or "revision", found[3] or "main", found[4] or ""
        if action == "branch" and self._logged_in():
            repository.branches.add(revision)
            self._json({})
            return
        if action in ("preupload", "commit"):
            self._upload(name, repository, action)
            return
        commit = repository.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "revision":
            self._info(name, repository, *commit)
        elif repository.gated and action == "resolve" and not self._logged_in():
            self._error(401, "GatedRepo", f"Access to dataset {name} is restricted")
        elif action == "tree":
            inside = {p: c for p, c in commit[1].items() if not path or p.startswith(f"{path}/")}
            self._json([*self._folders(inside, path), *(self._entry(p, c) for p, c in self._shown(inside, path))])
        elif action == "paths-info":
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            self._json([self._entry(p, commit[1][p]) for p in asked if p in commit[1]])
        elif action == "resolve" and path in commit[1]:
            self._file(commit[0], commit[1][path])
        else:
            self._error(404, "EntryNotFound", "Entry not found", commit[0])

    # -- reading ----------------------------------------------------------------------------------------------------

    def _info(self, name: str, repository: Repository, sha: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": path} for path in files]
        self._json(
            {
                "id": name,
                "sha": sha,
                "private": repository.private,
                "gated": repository.gated,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": siblings,
            }
        )

    def _shown(self, files: dict[str, bytes], path: str) -> list[tuple[str, bytes]]:
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return [(p, c) for p, c in files.items() if deep or "/" not in p.removeprefix(f"{path}/" if path else "")]

    def _folders(self, files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
        start = f"{path}/" if path else ""
        inside = {p.removeprefix(start).split("/")[0] for p in files if "/" in p.removeprefix(start)}
        return [{"type": "directory", "path": start + name, "oid": "0" * 40, "size": 0} for name in sorted(inside)]

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, sha: str, content: bytes) -> None:
        start, status = 0, 200
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            content = content[start : int(found[2]) + 1 if found[2] else None]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._send(status, content, {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

    # -- writing ----------------------------------------------------------------------------------------------------

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _account(self) -> None:
        if self.asked.startswith("/api/validate"):
            self._json({"errors": [], "warnings": []})
        elif not self._logged_in():
            self._error(401, "", "Invalid username or password.")
        elif self.asked.startswith("/api/whoami"):
            self._json({"type": "user", "name": "ada", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        else:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if not name.startswith("ada/"):
                self._error(403, "", f"You don't have the rights to create a dataset under the namespace {name}")
            elif name in self.hub.repositories:
                self._error(409, "", "You already created this dataset repo", url=f"{self.hub.address}/datasets/{name}")
            else:
                self.hub.add(
                    name,
                    {".gitattributes": ""},
                    private="private" in (asked.get("visibility"), asked.get("private") and "private"),
                )
                self._json({"url": f"{self.hub.address}/datasets/{name}", "name": name, "id": name})

    def _upload(self, name: str, repository: Repository, action: str) -> None:
        if not self._logged_in() or not name.startswith("ada/"):
            self._error(403, "", "Forbidden: you must have write access to upload to this repository")
        elif action == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(self.body)["files"]
            ]
            self._json({"files": files})
        else:
            files = dict(repository.commits[-1])
            for line in self.body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    repository.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(entry["value"]["path"], None)
            repository.commits.append(files)
            self._json(
                {
                    "success": True,
                    "commitOid": repository.sha(),
                    "hookOutput": "",
                    "commitUrl": f"{self.hub.address}/datasets/{name}/commit/{repository.sha()}",
                }
            )

    # -- answers ----------------------------------------------------------------------------------------------------

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, sha: str = "", **more: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(
            status,
            json.dumps({"error": message, **more}).encode(),
            {"Content-Type": "application/json", **headers, **({"X-Repo-Commit": sha} if sha else {})},
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
