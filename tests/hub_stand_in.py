"""A stand-in of the Hugging Face hub on this machine: repositories of models in memory, at the addresses of the true one."""

from __future__ import annotations

__all__ = ["HubStandIn", "hub_stand_in"]

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class HubStandIn:
    """What is stored, and what was asked.

    Attributes:
        url: its address.
        branches: repository -> branch -> path -> content.
        private: repositories that were made private.
        token: what writers have to show.
        asked: method and path of every request.
        large: digest -> content of files that are uploaded apart from their commit.
    """

    def __init__(self, token: str) -> None:
        self.url, self.token = "", token
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}

    def commit_of(self, name: str, branch: str) -> str:
        """The name of a branch's commit: a digest of its content."""
        files = sorted(self.branches[name][branch].items())
        return hashlib.sha1(repr(files).encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self._content()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.hub.branches else 200
            self.hub.branches.setdefault(name, {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self._send(status, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(200, self._large(json.loads(body)))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        if found is None or found[1] not in self.hub.branches:
            return self._send(404, {"error": "Repository not found"})
        name, what, branch = found.groups()
        branches = self.hub.branches[name]
        if what == "branch":
            status = 409 if branch in branches else 200
            branches.setdefault(branch, dict(branches["main"]))
            return self._send(status, {})
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {p: "lfs" if p.endswith(".safetensors") else "regular" for p in paths}
            return self._send(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del branches[branch][value["path"]]
        commit = self.hub.commit_of(name, branch)
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def do_PUT(self) -> None:
        """A large file, of which the commit then says only the digest."""
        content = self._content()
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._send(200, {})

    def _content(self) -> bytes:
        """Of a request, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _large(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where large files are uploaded to."""
        objects = [
            {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or file
        name = found[1] if found else ""
        if name not in self.hub.branches:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        branches = self.hub.branches[name]
        asked = ((file[2] if file else info[3] if info else None) or "main").removeprefix("refs/heads/")
        branch = next((b for b in branches if asked in (b, self.hub.commit_of(name, b))), None)
        if branch is None:
            return self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        files, commit = branches[branch], self.hub.commit_of(name, branch)
        if file is None:
            if info and info[2] == "tree":
                return self._send(200, [self._entry(p, content) for p, content in files.items()])
            siblings = [{"rfilename": p} for p in files]
            return self._send(
                200, {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
            )
        if file[3] not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[file[3]]
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
        }

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch, token: str = "hf_right") -> Iterator[HubStandIn]:  # noqa: S107
    """Inside, it runs, and the hub's client asks it alone, with no token of the user's."""
    import huggingface_hub.constants as constants

    hub = HubStandIn(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setenv("HF_TOKEN", "")
            yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
