"""A Hub on the loopback interface: enough of its HTTP API for huggingface_hub, diffusers and transformers.

It keeps repositories in memory: each commit holds the whole tree, so that every revision stays loadable. Small text
files travel inside the commit, weights by the LFS protocol. Clients run in processes of their own ([`LocalHub.run`]):
huggingface_hub reads `HF_ENDPOINT` when it is imported, so those who imported it with this one are forked
(`fork_server`). Xet storage is off there: it needs a second service.
"""

import base64
import hashlib
import json
import re
import socket
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from fork_server import PATIENCE, ForkServer


__all__ = ["HubError", "LocalHub", "Request", "hub", "processes"]

TOKEN = "hf_dummy"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png", ".jpg")  # what a new repository's .gitattributes names
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
BATCH_ROUTE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
FILE_ROUTE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API_ROUTE = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([\w-]+))?(?:/([^/]+))?(?:/(.*))?")


class Request(NamedTuple):
    method: str
    path: str


class HubError(Exception):
    """An answer other than 200; `code` is the `X-Error-Code` from which huggingface_hub chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: str):
        super().__init__(message)
        self.status, self.message, self.code, self.details = status, message, code, details


class ConnectionCut(Exception):
    """The server hung up in the middle of a request."""


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        """Id of the git object: of the content, or of the pointer file that stands for it in LFS."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id

    def describe(self) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 134}}
        return {"oid": self.git_id, "blobId": self.git_id, "size": len(self.content), **(lfs if self.is_lfs else {})}


@dataclass
class Repository:
    """Trees by commit id, oldest first, and the head of the one branch, `main`."""

    head: str = ""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, tree: dict[str, Blob], message: str) -> None:
        entries = [f"{path} {blob.git_id}" for path, blob in sorted(tree.items())]
        self.head = hashlib.sha1("\n".join([self.head, message, *entries]).encode()).hexdigest()
        self.commits[self.head] = tree

    def resolve(self, revision: str | None) -> str:
        sha = self.head if revision in (None, "main", "refs/heads/main") else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class LocalHub:
    """The server, its repositories, the log of its requests, and a way to run clients against it.

    Attributes:
        endpoint: `http://127.0.0.1:<port>`.
        requests: every `Request(method, path)` in order of arrival, with the path unquoted and without its query.
        processes: a [`ForkServer`] whose processes know no other Hub.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[Request] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._uploads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._uploads_until_failure: int | None = None
        self._num_homes = 0
        self._home = folder / "home"
        self.change_home()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self._home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # A busy machine is slow to answer.
            "HF_HUB_ETAG_TIMEOUT": str(PATIENCE),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE),
            "NO_PROXY": "*",
        }
        self.processes = ForkServer(folder, environment)

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.processes.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    # What tests call

    def run(self, code: str, home: Path | None = None) -> str:
        """Runs Python `code`, which may be indented, in a new process whose Hub is this server.

        Args:
            home: the process's `HF_HOME`; a new, empty one by default, so that nothing comes from an earlier cache.

        Returns:
            What it printed.
        """
        self.change_home(home)
        return self.processes.run(["-c", textwrap.dedent(code)])

    def change_home(self, home: Path | None = None) -> None:
        """Libraries read the name of `HF_HOME` when they are imported: it is a link to a folder that changes."""
        if home is None:
            self._num_homes += 1
            home = self.folder / f"home-{self._num_homes}"
        home.mkdir(exist_ok=True)
        self._home.unlink(missing_ok=True)
        self._home.symlink_to(home)

    def head(self, repo_id: str, repo_type: str = "model") -> str:
        """The commit id of `main`."""
        return self.repository(repo_id, repo_type).head

    def files(self, repo_id: str, revision: str | None = None, repo_type: str = "model") -> dict[str, bytes]:
        """Content by path at a revision."""
        repository = self.repository(repo_id, repo_type)
        return {path: blob.content for path, blob in repository.commits[repository.resolve(revision)].items()}

    def downloads(self, repo_id: str, since: str | None = None) -> list[str]:
        """Paths of the files of `repo_id` whose content was fetched, in order.

        Args:
            since: counts only from the last request for `/mark/<since>` on, and up to the next such request. A client
                process sets a mark with a GET (answered by 404), to tell its own steps apart.
        """
        found, counting = [], since is None
        for method, path in self.requests:
            if since is not None and path.startswith("/mark/"):
                counting = path == f"/mark/{since}"
            match = FILE_ROUTE.fullmatch(path)
            if counting and method == "GET" and match and match[2] == repo_id:
                found.append(match[4])
        return found

    def fail_after(self, num_uploads: int) -> None:
        """Cuts the connection half-way through an upload (an LFS file or a commit) after `num_uploads` that pass.

        Every later upload is refused (403, which huggingface_hub does not retry) until [`~LocalHub.heal`].
        """
        self._uploads_until_failure = num_uploads

    def heal(self) -> None:
        self._uploads_until_failure = None

    # What the request handler calls

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        if (repo_type, repo_id) not in self._repositories:
            raise HubError(404, f"Repository not found: {repo_id}", "RepoNotFound")
        return self._repositories[repo_type, repo_id]

    def admit_upload(self) -> bool:
        """Whether the next upload may pass; raises [`ConnectionCut`] if it is the one to fail."""
        with self._lock:
            if self._uploads_until_failure is None:
                return True
            self._uploads_until_failure -= 1
            if self._uploads_until_failure == -1:
                raise ConnectionCut
            return self._uploads_until_failure >= 0

    def create_repository(self, body: dict) -> dict:
        repo_type, name = body.get("type") or "model", f"{body.get('organization') or 'tester'}/{body['name']}"
        url = f"{self.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{name}"
        with self._lock:
            if (repo_type, name) in self._repositories:
                # The address is part of the refusal: `create_repo(exist_ok=True)` reads it.
                raise HubError(409, "You already created this repository", url=url)
            repository = self._repositories[repo_type, name] = Repository()
            repository.commit({".gitattributes": Blob(GIT_ATTRIBUTES, is_lfs=False)}, "initial commit")
        return {"url": url, "name": name}

    def describe(self, repo_id: str, repo_type: str, revision: str | None) -> dict:
        repository = self.repository(repo_id, repo_type)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": path, **blob.describe()} for path, blob in repository.commits[sha].items()]
        info = {"_id": sha[:24], "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha}
        return {**info, "private": False, "gated": False, "disabled": False, "tags": [], "siblings": siblings}

    def list_tree(self, repo_id: str, repo_type: str, revision: str, folder: str, recursive: bool) -> list[dict]:
        repository = self.repository(repo_id, repo_type)
        tree = repository.commits[repository.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, blob in tree.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    name = prefix + "/".join(parts[:depth])
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    entries[path] = {"type": "file", "path": path, **blob.describe()}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def plan_upload(self, repo_id: str, repo_type: str, revision: str, files: list[dict]) -> dict:
        repository = self.repository(repo_id, repo_type)
        tree = repository.commits[repository.resolve(revision)]
        plan = []
        for path, size in ((file["path"], file["size"]) for file in files):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or size > 2**20 else "regular"
            oid = tree[path].etag if path in tree else None
            plan.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": plan}

    def plan_lfs(self, objects: list[dict]) -> dict:
        plan = []
        for item in objects:
            upload = {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}}
            plan.append({**item, **({} if item["oid"] in self._uploads else upload)})
        return {"transfer": "basic", "objects": plan}

    def receive_lfs(self, oid: str, content: bytes) -> dict:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"The content does not match its SHA-256 {oid}")
        self._uploads[oid] = content
        return {}

    def commit(self, repo_id: str, repo_type: str, revision: str, operations: list[dict]) -> dict:
        """Applies all operations of a commit or none of them."""
        with self._lock:
            repository = self.repository(repo_id, repo_type)
            tree = dict(repository.commits[repository.resolve(revision)])
            message = ""
            for key, value in ((operation["key"], operation["value"]) for operation in operations):
                if key == "header":
                    message = value["summary"]
                    if value.get("parentCommit", repository.head) != repository.head:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    tree[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
                elif key == "lfsFile":
                    if value["oid"] not in self._uploads:
                        raise HubError(400, f"The LFS object of {value['path']} was never uploaded")
                    tree[value["path"]] = Blob(self._uploads[value["oid"]], is_lfs=True)
                elif key == "deletedFile":
                    del tree[value["path"]]
                elif key == "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    tree = {path: blob for path, blob in tree.items() if not path.startswith(folder)}
                else:
                    raise HubError(400, f"Unknown operation {key}")
            repository.commit(tree, message)
        url = f"{self.endpoint}/{repo_id}/commit/{repository.head}"
        return {"success": True, "commitOid": repository.head, "commitUrl": url, "hookOutput": ""}

    def fetch(self, repo_id: str, repo_type: str, revision: str, path: str) -> tuple[Blob, str]:
        repository = self.repository(repo_id, repo_type)
        sha = repository.resolve(revision)
        if path not in repository.commits[sha]:
            raise HubError(404, f"{path} does not exist in {repo_id} at {revision}", "EntryNotFound")
        return repository.commits[sha][path], sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE  # seconds without a byte, after which a connection's thread ends

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.hub: LocalHub = self.server.hub
        self.hub.requests.append(Request(self.command, unquote(url.path)))
        try:
            is_upload = self.command == "PUT" or (self.command == "POST" and "/commit/" in url.path)
            admitted = self.hub.admit_upload() if is_upload else True
            body = self.read_body()
            if not admitted:
                raise HubError(403, "Uploads are refused since a connection was cut")
            answer = self.route(url.path, "recursive=true" in url.query.lower(), body)
        except ConnectionCut:
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        except HubError as error:
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            self.answer(error.status, json.dumps({"error": error.message, **error.details}).encode(), headers)
        else:
            if answer is not None:
                self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str, recursive: bool, body: bytes) -> dict | list | None:
        if self.command in ("POST", "PUT") and "/lfs/" not in path:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and path != "/api/validate-yaml":
                raise HubError(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self.hub.create_repository(json.loads(body))
        if path == "/api/whoami-v2":
            return {"type": "user", "id": "0", "name": "tester", "fullname": "tester", "orgs": [], "auth": {}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/lfs/(\w{64})", path):
            return self.hub.receive_lfs(match[1], body)
        if match := BATCH_ROUTE.fullmatch(path):
            self.hub.repository(match[2], match[1] or "model")
            return self.hub.plan_lfs(json.loads(body)["objects"])
        if match := FILE_ROUTE.fullmatch(path):
            return self.send_file(match[2], match[1] or "model", unquote(match[3]), unquote(match[4]))
        if match := API_ROUTE.fullmatch(path):
            repo_type, repo_id, action, revision, rest = match.groups()
            revision = unquote(revision) if revision else None
            if action in (None, "revision"):
                return self.hub.describe(repo_id, repo_type, revision)
            if action == "tree":
                return self.hub.list_tree(repo_id, repo_type, revision, unquote(rest or ""), recursive)
            if action == "refs":
                head = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.head(repo_id, repo_type)}
                return {"branches": [head], "converts": [], "tags": [], "pullRequests": []}
            if action == "preupload":
                return self.hub.plan_upload(repo_id, repo_type, revision, json.loads(body)["files"])
            if action == "commit":
                return self.hub.commit(repo_id, repo_type, revision, [json.loads(row) for row in body.splitlines()])
        raise HubError(404, f"This Hub does not know {self.command} {path}")

    def send_file(self, repo_id: str, repo_type: str, revision: str, path: str) -> None:
        blob, sha = self.hub.fetch(repo_id, repo_type, revision, path)
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        self.answer(200, blob.content, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Keeps the tests' output clean: `LocalHub.requests` is the log."""


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A running, empty [`LocalHub`], shared by all tests: each uses repositories of its own."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="session")
def processes(hub) -> ForkServer:
    """Starts processes that have imported the libraries; what they can reach is the local Hub."""
    return hub.processes
