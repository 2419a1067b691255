"""A hub on the loopback: repositories to read, and to write with a token. `huggingface_hub` itself talks to it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LFS = (".parquet", ".safetensors")
Answer = tuple[int, dict[str, str], bytes]


def _files(folder: Path) -> list[tuple[str, int]]:
    paths = sorted(filter(Path.is_file, folder.rglob("*")))
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]


def _json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _refused(status: int, message: str) -> Answer:
    return status, {"X-Error-Message": message}, b""


class Hub:
    """A hub with datasets, each at one commit, and with whatever is uploaded.

    Args:
        repositories: Datasets by name: commit, licence, folder.
        models: Licences of models by name.
        store: Folder of what is uploaded.

    Attributes:
        served: How often each file was downloaded, by repository and name.
        broken: Files that cannot be downloaded.
        writers: Owners whose repositories a token may write.
        created: Visibility of the repositories that were created, by kind and name.
        failing: Steps of an upload that fail: preupload, lfs, commit.
    """

    def __init__(
        self,
        repositories: Mapping[str, tuple[str, str | None, Path]] | None = None,
        models: Mapping[str, str] | None = None,
        store: Path | None = None,
    ):
        self.repositories = dict(repositories or {})
        self.models, self.store = dict(models or {}), store
        self.served: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.writers: dict[str, set[str]] = {}
        self.created: dict[tuple[str, str], str] = {}
        self.failing: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.commits = 0

    def __enter__(self) -> Hub:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, token = self.path.partition("?")[0], self.headers.get("Authorization", "").removeprefix("Bearer ")
                if self.command in ("GET", "HEAD"):
                    status, headers, body = hub.answer(path, self.command) or hub.allow(path, token)
                else:
                    status, headers, body = hub.write(path, body, token)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, method: str) -> Answer | None:
        """Return status, headers and body of what is read; None for what this hub does not have."""
        for name, (commit, licence, folder) in self.repositories.items():
            if re.fullmatch(rf"/api/datasets/{name}(/revision/({commit}|main))?", path):
                card = {} if licence is None else {"license": licence}
                siblings = [{"rfilename": file, "size": size} for file, size in _files(folder)]
                return _json({"id": name, "sha": commit, "siblings": siblings, "cardData": card})
            if path == f"/api/datasets/{name}/tree/{commit}":
                entries = [
                    {"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in _files(folder)
                ]
                return _json(entries)
            if match := re.fullmatch(rf"/datasets/{name}/resolve/({commit}|main)/(.*)", path):
                if match[2] in self.broken:
                    return 404, {}, b""
                if not (folder / match[2]).is_file():
                    return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
                self.served[f"{name}/{match[2]}"] += method == "GET"
                data = (folder / match[2]).read_bytes()
                return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        if (model := path.removeprefix("/api/models/")) in self.models:
            return _json({"id": model, "sha": "a" * 40, "siblings": [], "cardData": {"license": self.models[model]}})
        return None

    def allow(self, path: str, token: str) -> Answer:
        """Answer whether a token may write, or that there is nothing of that name."""
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+)/([^/]+)/auth-check/write", path)
        if match and (match[1], f"{match[2]}/{match[3]}") in self.created:
            return _json({}) if match[2] in self.writers.get(token, ()) else _refused(403, "the token is for reading")
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def write(self, path: str, body: bytes, token: str) -> Answer:
        """Return status, headers and body of what is written."""
        if path.startswith("/lfs/"):  # such addresses are signed
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        owners = self.writers.get(token)
        if owners is None:
            return _refused(401, "Invalid username or password.")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            kind, name = wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}"
            if (kind, name) in self.created:
                return _json({"url": self._page(kind, name)}, 409)
            if wanted["organization"] not in owners:
                return _refused(403, "no right to create a repository there")
            self.created[kind, name] = wanted["visibility"]
            return _json({"url": self._page(kind, name)})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit)/main", path) or re.fullmatch(
            r"/()(?:datasets/)?([^/]+/[^/]+)\.git/info/(lfs)/objects/batch", path
        )
        assert match, path
        if match[2].partition("/")[0] not in owners:
            return _refused(403, "the token is for reading")
        if match[3] in self.failing:
            return _refused(403, f"the hub is full at {match[3]}")
        if match[3] == "preupload":
            modes = {file["path"]: file["path"].endswith(LFS) for file in json.loads(body)["files"]}
            files = [
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for name, large in modes.items()
            ]
            return _json({"files": files})
        if match[3] == "lfs":
            rows = [
                row | {"actions": {"upload": {"href": f"{self.url}/lfs/{row['oid']}"}}}
                for row in json.loads(body)["objects"]
            ]
            return _json({"transfer": "basic", "objects": rows})
        return self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])

    def _page(self, kind: str, name: str) -> str:
        return f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"

    def _validate(self, card: str) -> Answer:
        """Check what the real hub checks of a card, too: models are named by their repositories."""
        data = yaml.safe_load(card.split("---")[1]) or {}
        for name in ("base_model", "datasets", "source_datasets"):
            values = data.get(name) or []
            for value in [values] if isinstance(values, str) else values:
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                    return _json({"errors": [{"message": f"{name}: {value} is not valid"}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def _commit(self, kind: str, name: str, lines: list[dict[str, Any]]) -> Answer:
        assert self.store is not None
        folder = self.folder(kind, name)
        for line in lines:
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                data = base64.b64decode(value["content"]) if line["key"] == "file" else self.blobs[value["oid"]]
                assert line["key"] == "file" or hashlib.sha256(data).hexdigest() == value["oid"]
                path.write_bytes(data)
        self.commits += 1
        commit = f"{self.commits:040x}"
        if kind == "dataset":
            self.repositories[name] = commit, None, folder
        return _json({"commitUrl": f"{self._page(kind, name)}/commit/{commit}", "commitOid": commit})

    def folder(self, kind: str, name: str) -> Path:
        """The folder of what was uploaded to a repository."""
        assert self.store is not None
        return self.store / kind / name
