"""As much of the Hub as its client asks for to create, list, write and download a repository, on loopback.

Files go in the commit itself (upload mode "regular"), so that neither LFS nor Xet is needed.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class LoopbackHub:
    """`repositories`: id -> its commits, each a hash and the files by path; `private`: the ids that were created so."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[name]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives the server
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish.get('organization') or 'me'}/{wish['name']}"
            if name in self.hub.repositories:
                return self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repositories[name] = [("0" * 40, {".gitattributes": b""})]
            self.hub.private |= {name} if wish.get("private") or wish.get("visibility") == "private" else set()
            return self.answer({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        *_, owner, repository, verb, _ = path.split("/")  # /api/models/me/dog/commit/main
        if verb == "preupload":
            entries = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": entries})
        return self.commit(f"{owner}/{repository}", body)

    def commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.repositories[name][-1][1])
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                files.pop(operation["value"]["path"])
        commit = hashlib.sha1(body).hexdigest()
        self.hub.repositories[name].append((commit, files))
        url = f"{self.hub.url}/{name}/commit/{commit}"
        entries = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        self.answer(entries)

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} /{'/'.join(parts)}")
        api = parts[0] == "api"  # /api/models/me/dog[/revision|tree/main], /me/dog/resolve/main/file
        name = "/".join(parts[2:4] if api else parts[:2])
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound", 401)
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        if (state := self.hub.files(name, revision)) is None:
            return self.missing("RevisionNotFound")
        commit, files = state
        if api and len(parts) > 4 and parts[4] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self.answer(entries)
        if api:
            siblings = [{"rfilename": path} for path in files]
            entries = {"id": name, "sha": commit, "private": name in self.hub.private, "siblings": siblings}
            return self.answer(entries | {"tags": [], "downloads": 0, "modelId": name})
        if (data := files.get("/".join(parts[4:]))) is None:
            return self.missing("EntryNotFound")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(data, ETag=etag, X_Repo_Commit=commit, Content_Type="application/octet-stream")

    do_HEAD = do_GET
