"""One commit to a repo of the Hub: against the state it was made for, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError

from .errors import UnsupportedOperationError

__all__ = ["Operation", "commit", "seconds_before_retry"]

logger = logging.getLogger(__name__)

Operation = CommitOperationAdd | CommitOperationDelete

#: How often a commit is tried, where it is not the Hub's last word.
_ATTEMPTS = 4
#: Answers of a Hub that has somebody else's commit where ours was to go.
_CONFLICTS = (409, 412)
#: Longest that a Hub may ask to wait; a person would rather be told.
_LONGEST_WAIT = 300.0


def commit(
    api: HfApi,
    repo_id: str,
    operations: Callable[[ModelInfo], Sequence[Operation]],
    *,
    revision: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    **message: Any,
) -> CommitInfo:
    """Commit to a branch, which is made if need be, or open a pull request.

    Large files are uploaded first; what others see changes with the commit alone. A commit that was lost on the way,
    or that somebody else's came before, is made again against the repo as it then is.

    Args:
        api: the client.
        repo_id: an existing repo.
        operations: what to change in the repo that it is given; called anew for each attempt.
        revision: the branch; the default is ``main``. Or ``refs/pr/N``.
        create_pr: open a pull request against the branch instead.
        parent_commit: the only state that the commit is right for; by default whatever the branch has.
        **message: ``commit_message`` and ``commit_description``.

    Raises:
        UnsupportedOperationError: ``revision`` is a tag or a commit.
        ValueError: the Hub refused a card's metadata or a large file, or there is no commit message.
        OSError: a file cannot be read.
        huggingface_hub.errors.HTTPError: the Hub refused (:class:`~huggingface_hub.errors.HfHubHTTPError`, with the
            response), or could not be reached. Nothing was committed, unless the last answer was lost on its way.
    """
    for attempt in range(_ATTEMPTS):
        info, is_new = _target(api, repo_id, revision, create_pr)
        changes = operations(info)
        _upload(api, repo_id, changes, None if is_new else revision, create_pr)
        try:
            with _new_branch(api, repo_id, revision, info.sha) if is_new else contextlib.nullcontext():
                return api.create_commit(
                    repo_id,
                    changes,
                    revision=revision,
                    parent_commit=parent_commit or info.sha,
                    create_pr=create_pr,
                    **message,
                )
        except (HTTPError, json.JSONDecodeError) as error:
            # A pull request that was opened, but whose answer was lost, would be opened twice.
            seconds = seconds_before_retry(error, attempt, repeatable=not create_pr)
            outdated = parent_commit is not None and _status(error) in _CONFLICTS
            if seconds is None or outdated or attempt == _ATTEMPTS - 1:
                raise
            logger.info(f"The commit to {repo_id} is made again in {seconds:g} s: {error}")
            time.sleep(seconds)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _upload(api: HfApi, repo_id: str, changes: Sequence[Operation], revision: str | None, create_pr: bool) -> None:
    """Upload the large files of a commit, which nobody sees before it; huggingface_hub tries again by itself."""
    additions = [change for change in changes if isinstance(change, CommitOperationAdd)]
    try:
        api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=create_pr)
    except RuntimeError as error:  # says which file it was, and hides what the Hub said
        if isinstance(error.__cause__, HTTPError | OSError):
            raise error.__cause__ from error
        raise


def seconds_before_retry(error: Exception, attempt: int, *, repeatable: bool) -> float | None:
    """When to make again a request that failed; `None` if that would not help.

    Args:
        error: what huggingface_hub raised; a page in place of JSON is no answer of the Hub's.
        attempt: how many attempts failed before this one.
        repeatable: whether it does no harm if the Hub has done already what it is asked again.
    """
    status, patience = _status(error), float(2**attempt)
    if status in _CONFLICTS:
        return 0.0
    if status in (429, 503):  # the Hub has not begun
        seconds = _retry_after(error.response.headers, patience)  # type: ignore[attr-defined]
        return seconds if seconds <= _LONGEST_WAIT else None
    if repeatable and (status is None or status in (500, 502, 504)):
        return patience
    return None


def _status(error: Exception) -> int | None:
    """The Hub's answer; `None` if there was none."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)


def _retry_after(headers: Mapping[str, str], default: float) -> float:
    """The header's seconds. Its other form, a date, is none that the Hub sends."""
    try:
        return max(0.0, float(headers.get("Retry-After", default)))
    except ValueError:
        return default


def _target(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> tuple[ModelInfo, bool]:
    """The repo as the commit is to find it, and whether the branch is yet to be made."""
    if revision is None or revision.startswith(("refs/heads/", "refs/pr/")):
        return api.model_info(repo_id, revision=revision), False
    refs = api.list_repo_refs(repo_id)
    if revision in {branch.name for branch in refs.branches}:
        return api.model_info(repo_id, revision=revision), False
    try:
        api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if create_pr:
            raise
        return api.model_info(repo_id), True
    kind = "tag" if revision.removeprefix("refs/tags/") in {tag.name for tag in refs.tags} else "commit"
    raise UnsupportedOperationError(
        f"revision={revision!r} is a {kind} of {repo_id}, and a {kind} cannot be added to. Give the name of a branch; "
        "one that is not there yet is made."
    )


@contextlib.contextmanager
def _new_branch(api: HfApi, repo_id: str, branch: str | None, head: str | None) -> Iterator[None]:
    """Make a branch that starts at a commit, and take it away if nothing came of it."""
    assert branch is not None
    api.create_branch(repo_id, branch=branch, revision=head, exist_ok=True)
    try:
        yield
    except BaseException:  # a card that the Hub refuses is a ValueError; and somebody may press Ctrl-C
        with contextlib.suppress(HTTPError):
            if api.model_info(repo_id, revision=branch).sha == head:
                api.delete_branch(repo_id, branch=branch)
        raise
