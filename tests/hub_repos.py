"""Repos of the Hub that :mod:`tests.hub_server` serves: commits, branches, tags and pull requests, in memory."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".gz")


class HubError(Exception):
    """An HTTP error, with the code that huggingface_hub tells its exceptions apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, answer: object = None) -> None:
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


def stored(files: dict[str, bytes]) -> dict[str, StoredFile]:
    return {path: StoredFile(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}


@dataclass(frozen=True)
class Commit:
    files: dict[str, StoredFile]
    title: str
    parent: str | None


@dataclass
class PullRequest:
    """A pull request: where it was made from, where it goes to, and its own last commit."""

    number: int
    author: str
    title: str
    target: str
    base: str
    head: str
    status: str = "open"
    merge_commit: str | None = None


@dataclass
class Repo:
    id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, PullRequest] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def _add(self, commit: Commit) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha] = commit
        return sha

    def commit(self, branch: str, files: dict[str, StoredFile], title: str, parent: str | None) -> str:
        """A commit on a branch, or (``refs/pr/N``) on a pull request."""
        sha = self._add(Commit(files, title, parent))
        if branch in self.pulls:
            self.pulls[branch].head = sha
        else:
            self.branches[branch] = sha
        return sha

    def edit(self, branch: str, files: dict[str, bytes], title: str = "edited on the site") -> str:
        """A commit that somebody else makes, with these files changed."""
        head = self.branches[branch]
        return self.commit(branch, {**self.commits[head].files, **stored(files)}, title, head)

    def open_pull(self, target: str, files: dict[str, StoredFile], title: str, author: str) -> PullRequest:
        base, number = self.branches[target], len(self.pulls) + 1
        pull = PullRequest(number, author, title, target, base, self._add(Commit(files, title, base)))
        self.pulls[f"refs/pr/{number}"] = pull
        return pull

    def conflicts(self, pull: PullRequest) -> list[str]:
        """Files that both the pull request and its target changed since it was opened."""
        before, there, ours = (self.commits[s].files for s in (pull.base, self.branches[pull.target], pull.head))
        changed = {p for p in {*before, *ours} if before.get(p) != ours.get(p)}
        return sorted(p for p in changed if there.get(p) not in (before.get(p), ours.get(p)))

    def merge(self, pull: PullRequest) -> str:
        if pull.status != "open" or self.conflicts(pull):
            raise HubError(409, f"Pull request {pull.number} cannot be merged")
        before, there, ours = (self.commits[s].files for s in (pull.base, self.branches[pull.target], pull.head))
        files = dict(there)
        for path in {*before, *ours}:
            if before.get(path) != ours.get(path):
                files.pop(path, None)
                files |= {path: ours[path]} if path in ours else {}
        pull.status, parent = "merged", self.branches[pull.target]
        pull.merge_commit = self.commit(pull.target, files, f"{pull.title} (#{pull.number})", parent)
        return pull.merge_commit

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or commit is."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name) or (name if name in self.commits else None)
        found = self.pulls[name].head if name in self.pulls else found
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.commits[self.resolve(revision)].files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, newest first."""
        commits: list[Commit] = []
        sha: str | None = self.resolve(revision)
        while sha is not None:
            commits.append(self.commits[sha])
            sha = self.commits[sha].parent
        return commits
