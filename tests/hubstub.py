"""A small Hugging Face Hub on this machine: as much of its HTTP interface as huggingface_hub uses for model files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READS = "hf_right", "hf_reads"  # the second one may write nothing


class Hub:
    """Its repositories as {id: {branch: {file: bytes}}}, those that are private, and the requests it was sent."""

    def __init__(self):
        self.repos, self.private, self.requests, self.broken = {}, set(), [], False

    def resolve(self, repo, branch, name, token):
        """The bytes of a file, or the Hub's name for what is wrong."""
        if repo not in self.repos or (repo in self.private and token != TOKEN):
            return "RepoNotFound"
        if branch not in self.repos[repo]:
            return "RevisionNotFound"
        return self.repos[repo][branch].get(name, "EntryNotFound")


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def token(self):
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def do_GET(self):
            if self.path.startswith("/api/agent-harnesses"):  # what huggingface_hub asks on its own account
                return self.send(404)
            hub.requests.append(f"{self.command} {self.path}")
            if hub.broken is True or (hub.broken and self.path.endswith(hub.broken)):
                return self.send(503)
            if "?expand=xetEnabled" in self.path:  # before 1.0: whether to upload in another way
                return self.send(200, b'{"id": "user/name", "xetEnabled": false}', Content_Type="application/json")
            if not (asked := re.fullmatch(r"/(.+?/.+?)/resolve/([^/]+)/(.+)", self.path)):
                return self.send(404, X_Error_Code="RepoNotFound")
            repo, branch, name = asked.groups()
            found = hub.resolve(repo, branch, name, self.token())
            if isinstance(found, str):
                return self.send(401 if found == "RepoNotFound" else 404, X_Error_Code=found)
            digest = hashlib.sha1(found).hexdigest()
            self.send(200, found, X_Repo_Commit=digest, ETag=f'"{digest}"')

        do_HEAD = do_GET

        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            hub.requests.append(f"POST {self.path}")
            if self.path != "/api/validate-yaml" and self.token() != TOKEN:
                status = 403 if self.token() == READS else 401
                return self.send(status, b'{"error": "Invalid username or password."}')
            status, answer = self.answer(data)
            self.send(status, json.dumps(answer).encode(), Content_Type="application/json")

        def answer(self, data):
            if self.path == "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            if self.path == "/api/repos/create":
                asked = json.loads(data)
                repo = f"{asked['organization']}/{asked['name']}"
                if asked.get("visibility") == "private" or asked.get("private"):
                    hub.private.add(repo)
                known = repo in hub.repos
                hub.repos.setdefault(repo, {"main": {}})
                address = f"http://{self.headers['Host']}/{repo}"
                return (409 if known else 200), {"url": address, "name": repo, "id": "0", "error": "exists"}
            repo, what, branch = re.fullmatch(r"/api/models/(.+?/.+?)/(\w+)/(.+)", self.path).groups()
            if what == "branch":
                known = branch in hub.repos[repo]
                hub.repos[repo].setdefault(branch, dict(hub.repos[repo]["main"]))
                return (409 if known else 200), {}
            if what == "preupload":
                names = [each["path"] for each in json.loads(data)["files"]]
                return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.repos[repo][branch][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                else:
                    hub.message = entry["value"]["summary"]
            return 200, {
                "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/1",
                "commitOid": "1",
                "success": True,
            }

    return Handler


@contextmanager
def running(monkeypatch, cache):
    """A hub that huggingface_hub talks to meanwhile, with an empty cache in a folder."""
    from huggingface_hub import constants, file_download

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
