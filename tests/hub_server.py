"""A small stand-in for the Hugging Face Hub on the loopback interface, in memory, for tests.

It speaks what ``huggingface_hub`` needs to create a repo, commit to a branch or a pull request (regular and LFS
files), and download by revision. huggingface_hub reads its endpoint at import, so the client runs in another process,
with the variables of :meth:`HubServer.environment`:

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", script], env=os.environ | hub.environment("alice", cache))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".gz")
DATE = "2024-06-13T00:00:00.000Z"


class HubError(Exception):
    """An HTTP error, with the code that huggingface_hub tells its exceptions apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, answer: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.answer = status, code, answer or {"error": message}


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's object id: of the content, or of the pointer that git holds for an LFS file."""
        content = self.data
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: dict[str, StoredFile]
    title: str
    parent: str | None


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, StoredFile], title: str, parent: str | None) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha] = Commit(files, title, parent)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision) or (revision if revision in self.commits else None)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first."""
        commits, sha = [], self.branches.get(revision)
        while sha is not None:
            commits.append(self.commits[sha])
            sha = self.commits[sha].parent
        return commits


class HubServer:
    """The server; a context manager. ``before_commit`` is called once, before the next commit is checked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.before_commit: Any = None
        # The client follows a redirect that stays on one host and then misses X-Repo-Commit: LFS has its own host.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        ports = [server.server_address[1] for server in self._servers]
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
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
        stored = {path: StoredFile(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        repo.commit("main", stored, "initial commit", None)
        return repo

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (_Handler,), {"hub": self})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/models/({repo})", "model_info"),
        ("GET", r"/api/models/({repo})/revision/([^/]+)", "model_info"),
        ("GET", r"/api/models/({repo})/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/api/models/({repo})/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/({repo})/commits/([^/]+)", "commits"),
        ("POST", r"/api/models/({repo})/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/({repo})/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/({repo})/branch/([^/]+)", "branch"),
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
        self.query, self.body = parse_qs(url.query), self._read_body()
        try:
            for method, pattern, action in self.routes:
                match = re.fullmatch(pattern.format(repo=r"[\w.\-]+(?:/[\w.\-]+)?"), url.path)
                if method == self.command and match:
                    with self.hub.lock:
                        getattr(self, action)(*(unquote(group) for group in match.groups() if group))
                    return
            raise HubError(404, f"no route {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, error.answer, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, answer: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(raw)), "X-Request-Id": "test"}
        for name, value in (defaults | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").split()[-1:]
        return token[0].removeprefix("hf_") if token else None

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo, user = self.hub.repos.get(repo_id), self._user()
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, "You don't have the required permissions")
        return repo

    # -- repos -----------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self._send(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self) -> None:
        self._send(200, {"warnings": [], "errors": []})

    def create_repo(self) -> None:
        request, user = json.loads(self.body), self._user()
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        repo_id = f"{request.get('organization') or user}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", answer=answer)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._send(200, answer)

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise HubError(409, f"Reference refs/heads/{name} already exists")
        repo.branches[name] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        self._send(200)

    # -- reading ---------------------------------------------------------------------------------------------------

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        files = repo.commits[sha].files
        card = files["README.md"].data.decode(errors="replace") if "README.md" in files else ""
        header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        answer = {"_id": "0", "id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "tags": []}
        answer["cardData"] = yaml.safe_load(header[1]) if header else {}
        answer["siblings"] = [{"rfilename": path} for path in sorted(files)]
        self._send(200, answer | {"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0})

    def _entries(self, repo_id: str, revision: str, wanted: set[str] | None = None) -> list[dict[str, Any]]:
        repo = self._repo(repo_id)
        entries = []
        for path, file in sorted(repo.commits[repo.resolve(revision)].files.items()):
            if wanted is None or path in wanted:
                entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
                lfs = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
                entries.append(entry | ({"lfs": lfs} if file.lfs else {}))
        return entries

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        inside = [entry for entry in self._entries(repo_id, revision) if entry["path"].startswith(f"{folder}/")]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._send(200, inside if folder else self._entries(repo_id, revision))

    def paths_info(self, repo_id: str, revision: str) -> None:
        is_json = self.body.startswith(b"{")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        self._send(200, self._entries(repo_id, revision, set(paths)))

    def commits(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        answer, sha = [], repo.resolve(revision)
        while sha is not None:
            commit = repo.commits[sha]
            answer.append({"id": sha, "title": commit.title, "message": "", "date": DATE, "authors": []})
            sha = commit.parent
        self._send(200, answer)

    def download(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        file = repo.commits[sha].files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.lfs:
            self.hub.blobs[file.sha256] = file.data
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.data))}
            self._send(302, None, headers | {"Location": f"{self.hub.storage_url}/lfs/{file.sha256}"})
        else:
            self._send(200, file.data, headers)

    # -- writing ---------------------------------------------------------------------------------------------------

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files = repo.commits[repo.resolve(revision)].files
        answer = []
        for request in json.loads(self.body)["files"]:
            path = request["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": files[path].sha256 if files[path].lfs else files[path].oid} if path in files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        self._send(200, {"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for request in json.loads(self.body)["objects"]:
            answer = {"oid": request["oid"], "size": request["size"], "authenticated": True}
            if request["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage_url}/lfs/{request['oid']}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _refuse_token(self) -> None:
        if self.headers.get("Authorization"):
            raise HubError(400, "the Hub's token leaked to the storage host")

    def lfs_put(self, sha256: str) -> None:
        self._refuse_token()
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "sha256 mismatch")
        self.hub.blobs[sha256] = self.body
        self._send(200, None, {"ETag": f'"{sha256}"'})

    def lfs_get(self, sha256: str) -> None:
        self._refuse_token()
        self._send(200, self.hub.blobs[sha256], {"ETag": f'"{sha256}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        hook, self.hub.before_commit = self.hub.before_commit, None
        if hook is not None:
            hook(repo)
        head = repo.resolve(revision)
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
        pulls = [name for name in repo.branches if name.startswith("refs/pr/")]
        branch = f"refs/pr/{len(pulls) + 1}" if "create_pr" in self.query else revision
        sha = repo.commit(branch, files, title, head)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{len(pulls) + 1}"
        self._send(200, answer)
