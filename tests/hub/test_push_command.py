"""``meswitch push``, and where pushes go: branches, tags, pull requests to repos of others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from tests.hub.conftest import Client
from tests.hub_server import HubServer
from transformers_meswitch.cli import main
from transformers_meswitch.errors import UnsupportedOperationError
from transformers_meswitch.hub import push_folder

pytestmark = pytest.mark.integration


def test_push(hub: HubServer, client: Client, delta_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(delta_folder)
    assert main(["push", folder, "delta", "--private", "--commit-message", "First"]) == 0
    repo = hub.repos["alice/delta"]
    assert repo.private
    assert repo.history()[0].title == "First"
    assert capsys.readouterr().out == f"{hub.url}/alice/delta/commit/{repo.branches['main']}\n"
    assert main(["push", folder, "alice/delta", "--revision", "v1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pr_url"] is None
    assert repo.files("v1")["adapter_model.safetensors"] == (delta_folder / "adapter_model.safetensors").read_bytes()


def test_what_cannot_be_pushed_is_said_in_one_line(
    hub: HubServer, client: Client, delta_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path / "nothing"), "alice/delta"]) == 1
    assert "holds neither adapter_config.json" in capsys.readouterr().err
    assert main(["push", str(delta_folder), "not/an/id"]) == 1
    assert "error: " in capsys.readouterr().err
    assert not hub.repos
    hub.__exit__()
    assert main(["push", str(delta_folder), "alice/delta"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_pull_request_to_somebody_elses_repo(hub: HubServer, client: Client, delta_folder: Path) -> None:
    push_folder(delta_folder, "alice/delta")
    before = hub.repos["alice/delta"].files()
    weights = os.urandom(64)
    (delta_folder / "adapter_model.safetensors").write_bytes(weights)
    client.become("bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(delta_folder, "alice/delta")
    info = push_folder(delta_folder, "alice/delta", create_pr=True, commit_message="Better", commit_description="Why.")
    repo = hub.repos["alice/delta"]
    assert repo.files() == before
    assert info.pr_revision == "refs/pr/1"
    found = list(HfApi().get_repo_discussions("alice/delta"))
    assert [(d.num, d.title, d.author, d.status, d.is_pull_request) for d in found] == [
        (1, "Better", "bob", "open", True)
    ]
    assert repo.files("refs/pr/1")["adapter_model.safetensors"] == weights
    client.become("alice")
    HfApi().merge_pull_request("alice/delta", 1)
    assert repo.files()["adapter_model.safetensors"] == weights
    push_folder(delta_folder, "alice/delta", revision="refs/pr/1")
    assert len(repo.pulls) == 1, "a push to a pull request adds to it"


def test_a_pull_request_goes_to_a_branch_that_is_there(hub: HubServer, client: Client, delta_folder: Path) -> None:
    push_folder(delta_folder, "alice/delta", revision="v1")
    (delta_folder / "notes.txt").write_text("new")
    push_folder(delta_folder, "alice/delta", revision="v1", create_pr=True)
    assert hub.repos["alice/delta"].pulls["refs/pr/1"].target == "v1"
    with pytest.raises(RevisionNotFoundError):
        push_folder(delta_folder, "alice/delta", revision="v2", create_pr=True)
    assert set(hub.repos["alice/delta"].branches) == {"main", "v1"}


@pytest.mark.parametrize(("revision", "kind"), [("v1", "tag"), ("refs/tags/v1", "tag"), (None, "commit")])
def test_tags_and_commits_are_not_pushed_to(
    hub: HubServer, client: Client, delta_folder: Path, revision: str | None, kind: str
) -> None:
    push_folder(delta_folder, "alice/delta")
    HfApi().create_tag("alice/delta", tag="v1")
    repo = hub.repos["alice/delta"]
    before = len(hub.requests)
    with pytest.raises(UnsupportedOperationError, match=f"is a {kind} of alice/delta"):
        push_folder(delta_folder, "alice/delta", revision=revision or repo.branches["main"])
    assert not [r for r in hub.requests[before:] if r.method in ("PUT",) or "/commit/" in r.path]
    assert set(repo.branches) == {"main"}


def test_a_push_of_what_is_there_makes_no_commit(hub: HubServer, client: Client, delta_folder: Path) -> None:
    first = push_folder(delta_folder, "alice/delta")
    for arguments in ({}, {"create_pr": True}, {"revision": "refs/heads/main"}):
        assert push_folder(delta_folder, "alice/delta", **arguments).oid == first.oid
    repo = hub.repos["alice/delta"]
    assert (len(repo.history()), repo.pulls) == (2, {})


def test_pull_requests_of_the_stand_in_conflict_as_on_the_hub(
    hub: HubServer, client: Client, delta_folder: Path
) -> None:
    """The stand-in itself: what both sides changed cannot be merged, what one changed is."""
    push_folder(delta_folder, "alice/delta")
    repo = hub.repos["alice/delta"]
    for _ in range(2):
        (delta_folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
        push_folder(delta_folder, "alice/delta", create_pr=True)
    repo.edit("main", {"notes.txt": b"kept"})
    HfApi().merge_pull_request("alice/delta", 1)
    assert repo.files()["notes.txt"] == b"kept"
    assert HfApi().get_discussion_details("alice/delta", 1).status == "merged"
    assert HfApi().get_discussion_details("alice/delta", 2).conflicting_files == ["adapter_model.safetensors"]
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().merge_pull_request("alice/delta", 2)
