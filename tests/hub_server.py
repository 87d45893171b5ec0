"""A small stand-in for the Hugging Face Hub on the loopback interface, in memory, for tests.

It speaks what ``huggingface_hub`` needs to create a repo, commit to a branch or a pull request (regular and LFS
files), tag, merge, and download by revision. Every request is logged with the bytes that went each way, and any can be
made to fail (:class:`tests.hub_faults.Fault`). A client in another process gets the variables of
:meth:`HubServer.environment`, which huggingface_hub reads at import; one in this process is the fixture ``client``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_faults import Fault
from tests.hub_repos import LFS_SUFFIXES, HubError, PullRequest, Repo, StoredFile, stored

DATE = "2024-06-13T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """A request that was answered, and the bytes of its body and of the answer's."""

    method: str
    path: str
    status: int
    received: int
    sent: int
    time: float


class HubServer:
    """The server; a context manager. ``before_commit`` is called once, before the next commit is checked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.before_commit: Any = None
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        # The client follows a redirect that stays on one host and then misses X-Repo-Commit: LFS has its own host.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        ports = [server.server_address[1] for server in self._servers]
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, user: str, cache: str) -> dict[str, str]:
        """Variables for a client process that acts as ``user`` and caches in the folder ``cache``."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": f"hf_{user}", "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1"}
        return settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}

    def add_repo(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", stored(files), "initial commit", None)
        return repo

    def downloads(self, since: int = 0) -> dict[str, int]:
        """Bytes of files that were sent, by name in the repo (LFS files by digest), since request number ``since``."""
        found: dict[str, int] = {}
        for request in self.requests[since:]:
            match = re.search(r"/(?:resolve/[^/]+|lfs)/(.+)", request.path)
            if match and request.method == "GET" and request.status < 300 and request.sent:
                found[match[1]] = found.get(match[1], 0) + request.sent
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (_Handler,), {"hub": self})


class _Dropped(Exception):
    """The connection is closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    logged: Request | None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/models/({repo})", "model_info"),
        ("GET", r"/api/models/({repo})/revision/([^/]+)", "model_info"),
        ("GET", r"/api/models/({repo})/refs", "refs"),
        ("GET", r"/api/models/({repo})/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/api/models/({repo})/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/({repo})/commits/([^/]+)", "commits"),
        ("POST", r"/api/models/({repo})/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/({repo})/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/({repo})/branch/([^/]+)", "branch"),
        ("DELETE", r"/api/models/({repo})/branch/([^/]+)", "delete_branch"),
        ("POST", r"/api/models/({repo})/tag/([^/]+)", "tag"),
        ("GET", r"/api/models/({repo})/discussions", "discussions"),
        ("GET", r"/api/models/({repo})/discussions/(\d+)", "discussion"),
        ("POST", r"/api/models/({repo})/discussions/(\d+)/merge", "merge"),
        ("POST", r"/({repo})\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{{64}})", "lfs_put"),
        ("GET", r"/lfs/([0-9a-f]{{64}})", "lfs_get"),
        ("HEAD", r"/lfs/([0-9a-f]{{64}})", "lfs_get"),
        ("GET", r"/({repo})/resolve/([^/]+)/(.+)", "download"),
        ("HEAD", r"/({repo})/resolve/([^/]+)/(.+)", "download"),
    ]

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the tests' output is not the place for an access log."""

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body, self.sent, self.logged = parse_qs(url.query), b"", 0, None
        with self.hub.lock:
            self.fault = next((f for f in self.hub.faults if f.is_of(self.command, url.path)), None)
            if self.fault is not None:
                self.fault.use()
        try:
            if self.fault is not None:
                time.sleep(self.fault.delay)
            self.body = self._read_body()
            self._answer(url.path)
        except (_Dropped, ConnectionError):
            self.close_connection = True
            self._log(0, self.sent)
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, path: str) -> None:
        try:
            if self.fault is not None and self.fault.status is not None:
                raise HubError(self.fault.status, self.fault.message, answer=self.fault.page)
            for method, pattern, action in self.routes:
                match = re.fullmatch(pattern.format(repo=r"[\w.\-]+(?:/[\w.\-]+)?"), path)
                if method == self.command and match:
                    with self.hub.lock:
                        answer = getattr(self, action)(*(unquote(group) for group in match.groups() if group))
                    self._send(*answer)
                    return
            raise HubError(404, f"no route {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, error.answer, headers | (self.fault.headers if self.fault else {}))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _read_body(self) -> bytes:
        drop_after = self.fault.drop_after if self.fault is not None and self.command in ("POST", "PUT") else None
        if drop_after is not None:
            self.rfile.read(drop_after)
            raise _Dropped
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _log(self, status: int, sent: int) -> None:
        """Log the request, or what became of it after all."""
        path = urlsplit(self.path).path
        request = Request(self.command, path, status, len(self.body), sent, time.monotonic())
        with self.hub.lock:
            if self.logged is None:
                self.hub.requests.append(request)
            else:
                self.hub.requests[self.hub.requests.index(self.logged)] = request
        self.logged = request

    def _send(self, status: int, answer: Any = None, headers: dict[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.lose_answer:
            raise _Dropped
        raw = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(raw)), "X-Request-Id": "test"}
        for name, value in (defaults | (headers or {})).items():
            self.send_header(name, value)
        drop_after = self.fault.drop_after if self.fault is not None else None
        part = b"" if self.command == "HEAD" else raw if drop_after is None else raw[:drop_after]
        dropped = self.command != "HEAD" and len(part) < len(raw)
        if not dropped:
            # Before the client has it all: it may go on, and read this log, before this thread does.
            self._log(status, len(part))
        self.end_headers()
        self.wfile.write(part)
        self.sent = len(part)
        if dropped:
            raise _Dropped

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").split()[-1:]
        return token[0].removeprefix("hf_") if token else None

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """A repo that the user may read; for writing, its own, or any for a pull request."""
        repo, user = self.hub.repos.get(repo_id), self._user()
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and user != owner and "create_pr" not in self.query:
            raise HubError(403, "You don't have the required permissions")
        return repo

    # -- repos -----------------------------------------------------------------------------------------------------

    def whoami(self) -> Any:
        return 200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self) -> Any:
        return 200, {"warnings": [], "errors": []}

    def create_repo(self) -> Any:
        request, user = json.loads(self.body), self._user()
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        if request.get("organization") not in (None, user):
            raise HubError(403, f"You don't have the rights to create a model under {request['organization']!r}")
        repo_id = f"{user}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", answer=answer)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return 200, answer

    def refs(self, repo_id: str) -> Any:
        repo = self._repo(repo_id)
        named = {"branches": ("refs/heads/", repo.branches), "tags": ("refs/tags/", repo.tags)}
        answer: dict[str, Any] = {
            kind: [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]
            for kind, (prefix, refs) in named.items()
        }
        pulls = [{"name": p.split("/")[-1], "ref": p, "targetCommit": pull.head} for p, pull in repo.pulls.items()]
        return 200, answer | {"converts": [], "pullRequests": pulls if "include_prs" in self.query else []}

    def branch(self, repo_id: str, name: str) -> Any:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise HubError(409, f"Reference refs/heads/{name} already exists")
        repo.branches[name] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        return (200,)

    def delete_branch(self, repo_id: str, name: str) -> Any:
        repo = self._repo(repo_id, write=True)
        if name == "main":
            raise HubError(403, "Cannot delete refs/heads/main")
        if repo.branches.pop(name, None) is None:
            raise HubError(404, f"Reference refs/heads/{name} does not exist", "RevisionNotFound")
        return (200,)

    def tag(self, repo_id: str, revision: str) -> Any:
        repo, name = self._repo(repo_id, write=True), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubError(409, "Tag reference exists already")
        repo.tags[name] = repo.resolve(revision)
        return (200,)

    # -- pull requests ---------------------------------------------------------------------------------------------

    def _described(self, repo: Repo, pull: PullRequest) -> dict[str, Any]:
        changes = {"base": f"refs/heads/{pull.target}", "mergeCommitId": pull.merge_commit}
        answer = {"num": pull.number, "title": pull.title, "status": pull.status, "isPullRequest": True}
        answer |= {"author": {"name": pull.author}, "createdAt": DATE, "repo": {"name": repo.id, "type": "model"}}
        return answer | {"changes": changes, "filesWithConflicts": repo.conflicts(pull), "events": [], "diff": ""}

    def discussions(self, repo_id: str) -> Any:
        repo = self._repo(repo_id)
        found = [self._described(repo, pull) for pull in repo.pulls.values()]
        return 200, {"discussions": found, "count": len(found), "start": 0}

    def discussion(self, repo_id: str, number: str) -> Any:
        repo = self._repo(repo_id)
        if f"refs/pr/{number}" not in repo.pulls:
            raise HubError(404, f"Discussion {number} not found")
        return 200, self._described(repo, repo.pulls[f"refs/pr/{number}"])

    def merge(self, repo_id: str, number: str) -> Any:
        repo = self._repo(repo_id, write=True)
        repo.merge(repo.pulls[f"refs/pr/{number}"])
        return 200, {}

    # -- reading ---------------------------------------------------------------------------------------------------

    def model_info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        files = repo.commits[sha].files
        card = files["README.md"].data.decode(errors="replace") if "README.md" in files else ""
        header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        answer = {"_id": "0", "id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "tags": []}
        answer["cardData"] = yaml.safe_load(header[1]) if header else {}
        answer["siblings"] = [{"rfilename": path} for path in sorted(files)]
        return 200, answer | {"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0}

    def _entries(self, repo_id: str, revision: str, wanted: set[str] | None = None) -> list[dict[str, Any]]:
        repo = self._repo(repo_id)
        entries = []
        for path, file in sorted(repo.commits[repo.resolve(revision)].files.items()):
            if wanted is None or path in wanted:
                entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
                lfs = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
                entries.append(entry | ({"lfs": lfs} if file.lfs else {}))
        return entries

    def tree(self, repo_id: str, revision: str, folder: str = "") -> Any:
        inside = [entry for entry in self._entries(repo_id, revision) if entry["path"].startswith(f"{folder}/")]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return 200, inside if folder else self._entries(repo_id, revision)

    def paths_info(self, repo_id: str, revision: str) -> Any:
        is_json = self.body.startswith(b"{")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        return 200, self._entries(repo_id, revision, set(paths))

    def commits(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id)
        answer = []
        sha: str | None = repo.resolve(revision)
        while sha is not None:
            commit = repo.commits[sha]
            answer.append({"id": sha, "title": commit.title, "message": "", "date": DATE, "authors": []})
            sha = commit.parent
        return 200, answer

    def download(self, repo_id: str, revision: str, path: str) -> Any:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        file = repo.commits[sha].files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.lfs:
            self.hub.blobs[file.sha256] = file.data
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.data))}
            return 302, None, headers | {"Location": f"{self.hub.storage_url}/lfs/{file.sha256}"}
        return self._ranged(file.data, headers)

    def _ranged(self, data: bytes, headers: dict[str, str]) -> Any:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match is None:
            return 200, data, headers
        start = int(match[1])
        return 206, data[start:], headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}

    # -- writing ---------------------------------------------------------------------------------------------------

    def preupload(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id, write=True)
        files = repo.commits[repo.resolve(revision)].files
        answer = []
        for request in json.loads(self.body)["files"]:
            path = request["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": files[path].sha256 if files[path].lfs else files[path].oid} if path in files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return 200, {"files": answer}

    def lfs_batch(self, repo_id: str) -> Any:
        self._repo(repo_id)  # whoever may open a pull request may upload for it
        objects = []
        for request in json.loads(self.body)["objects"]:
            answer = {"oid": request["oid"], "size": request["size"], "authenticated": True}
            if request["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage_url}/lfs/{request['oid']}"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _refuse_token(self) -> None:
        if self.headers.get("Authorization"):
            raise HubError(400, "the Hub's token leaked to the storage host")

    def lfs_put(self, sha256: str) -> Any:
        self._refuse_token()
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "sha256 mismatch")
        self.hub.blobs[sha256] = self.body
        return 200, None, {"ETag": f'"{sha256}"'}

    def lfs_get(self, sha256: str) -> Any:
        self._refuse_token()
        return self._ranged(self.hub.blobs[sha256], {"ETag": f'"{sha256}"'})

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id, write=True)
        hook, self.hub.before_commit = self.hub.before_commit, None
        if hook is not None:
            hook(repo)
        branch = revision.removeprefix("refs/heads/")
        if branch not in {**repo.branches, **repo.pulls}:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.resolve(branch)
        files, title = dict(repo.commits[head].files), ""
        for line in self.body.splitlines():
            request = json.loads(line)
            value = request["value"]
            if request["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise HubError(412, "The branch was updated since you opened this page. Please refresh.")
            elif request["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif request["key"] == "lfsFile":
                files[value["path"]] = StoredFile(self.hub.blobs[value["oid"]], lfs=True)
            elif request["key"] == "deletedFile":
                del files[value["path"]]
        answer: dict[str, Any] = {"success": True}
        if "create_pr" in self.query:
            pull = repo.open_pull(branch, files, title, str(self._user()))
            sha, answer["pullRequestUrl"] = pull.head, f"{self.hub.url}/{repo_id}/discussions/{pull.number}"
        else:
            sha = repo.commit(branch, files, title, head)
        return 200, answer | {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
