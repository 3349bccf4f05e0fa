"""Local stand-in for the Hugging Face hub, with the part of its protocol that uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, READER = "hf_writer", "hf_reader"


@dataclass
class Hub:
    """What was uploaded.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: name → {"private": ..., "branches": {branch: {path: content}}}.
        commits: messages.
    """

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub where `TOKEN` may write as "user", `READER` may not, and owner "broken" makes it fail."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READER):
                return self.answer(401, {"error": "Invalid username or password."})
            if token == READER:
                return self.answer(403, {"error": "You don't have the rights to create a model"})
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                return self.create(json.loads(body))
            if parts == ["api", "validate-yaml"]:
                known = "license: sold" not in json.loads(body)["content"]
                errors = [] if known else [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]
                return self.answer(200 if known else 400, {"errors": errors, "warnings": []})
            if self.path.endswith(".git/info/lfs/objects/batch"):
                return self.batch(json.loads(body)["objects"])
            name, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
            files = hub.repositories[name]["branches"]
            if action == "branch":
                files[branch] = {}
                return self.answer(201, {})
            if branch not in files:
                return self.answer(404, {"error": f"Invalid rev id: {branch}"})
            if action == "preupload":
                return self.answer(200, {"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]})
            assert action == "commit"
            return self.commit(files[branch], name, [json.loads(line) for line in body.splitlines()])

        def create(self, wanted: dict[str, Any]) -> None:
            owner, name = wanted.get("organization", "user"), wanted["name"]
            if owner == "broken":
                return self.answer(500, {"error": "Internal Error - We're working hard to fix this"})
            if owner != "user":
                return self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
            full, is_new = f"{owner}/{name}", f"{owner}/{name}" not in hub.repositories
            if is_new:
                private = wanted.get("private") or wanted.get("visibility") == "private"
                hub.repositories[full] = {"private": bool(private), "branches": {"main": {}}}
            self.answer(200 if is_new else 409, {"url": f"{hub.url}/{full}", "name": full, "id": full})

        @staticmethod
        def mode(path: str) -> dict[str, Any]:
            large = path.endswith((".safetensors", ".png"))
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

        def batch(self, objects: list[dict[str, Any]]) -> None:
            answers = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}", "header": {}}}} for one in objects
            ]
            self.answer(200, {"transfer": "basic", "objects": answers})

        def commit(self, files: dict[str, bytes], name: str, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            oid = "0" * 40
            self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.objects[oid] = content
            self.answer(200, {})

        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5])
            known = name in hub.repositories
            self.answer(200 if known else 404, {"id": name, "sha": "0" * 40, "siblings": []} if known else {})

        do_HEAD = do_GET

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
