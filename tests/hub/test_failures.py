"""Whatever fails on the way to or from the Hub: the right exception or a completed retry, and nothing by halves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError
from transformers import AutoModelForCausalLM

from tests.hub.conftest import Client, Published
from tests.hub.test_pull import logits
from tests.hub_faults import Fault
from tests.hub_repos import HubError, Repo
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta, resolve_delta
from transformers_meswitch.errors import DeltaFormatError
from transformers_meswitch.hub import push_folder

pytestmark = pytest.mark.integration

UPLOAD = ("PUT", "/lfs/")
COMMIT = ("POST", "/commit/")
CARD = ("POST", "/api/validate-yaml")
INFO = ("GET", r"/api/models/alice/delta$")
PREUPLOAD = ("POST", "/preupload/")
BATCH = ("POST", "/objects/batch")
WEIGHTS = ("GET", "/lfs/")
CONFIG = ("GET", "adapter_config.json")
CONFIG_HEAD = ("HEAD", "adapter_config.json")
BUSY = {"Retry-After": "7"}


def name_of(value: object) -> str:
    if not isinstance(value, Fault):
        return ""
    dropped = "answer lost" if value.lose_answer else f"delay {value.delay}" if value.delay else "dropped"
    often = "" if value.times == 1 else f", {value.times or 'all'} times"
    return f"{value.method} {value.path.strip('/$')}: {value.status or dropped}{often}"


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault(*UPLOAD, drop_after=40), 1),
        (Fault(*UPLOAD, drop_after=0, times=3), 1 + 2 + 4),
        (Fault(*UPLOAD, status=500), 1),
        (Fault(*UPLOAD, status=429, headers=BUSY), 7),
        (Fault(*UPLOAD, lose_answer=True), 1),
        (Fault(*BATCH, status=500), 1),
        (Fault(*PREUPLOAD, drop_after=10), 1),
        (Fault(*PREUPLOAD, status=429, headers=BUSY), 7),
        (Fault(*COMMIT, drop_after=10), 1),
        (Fault(*COMMIT, status=500, times=2), 1 + 2),
        (Fault(*COMMIT, status=429, headers=BUSY), 7),
        (Fault(*COMMIT, status=503, headers=BUSY), 7),
        (Fault(*COMMIT, status=409), 0),
        (Fault(*COMMIT, status=412), 0),
        (Fault(*COMMIT, lose_answer=True), 1),
        (Fault(*COMMIT, status=200, page=b"<html>"), 1),
        (Fault(*CARD, status=500, page=b"<html>"), 1),
        (Fault(*CARD, drop_after=10), 1),
        (Fault(*COMMIT, delay=0.5), 0),
        (Fault(*UPLOAD, delay=0.5), 0),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("revision", [None, "new"])
def test_a_push_that_can_be_completed_is(
    hub: HubServer,
    client: Client,
    delta_folder: Path,
    waits: list[float],
    fault: Fault,
    seconds: float,
    revision: str | None,
) -> None:
    hub.faults.append(Fault(**vars(fault)))
    info = push_folder(delta_folder, "alice/delta", revision=revision)
    repo = hub.repos["alice/delta"]
    branch = revision or "main"
    assert info.oid == repo.branches[branch]
    assert repo.files(branch)["adapter_model.safetensors"] == (delta_folder / "adapter_model.safetensors").read_bytes()
    assert len(repo.history(branch)) == 2, "one commit, however often it was tried"
    assert seconds <= sum(waits) <= seconds + 2, "as long as the Hub asked for, or a second and then twice as long"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("POST", "/api/repos/create", status=401), HfHubHTTPError, "401"),
        (Fault("POST", "/api/repos/create", status=403), HfHubHTTPError, "403"),
        (Fault("POST", "/api/repos/create", status=429, headers=BUSY), HfHubHTTPError, "429"),
        (Fault(*INFO, status=401, message="Invalid username or password."), HfHubHTTPError, "401"),
        (Fault(*INFO, status=404), HfHubHTTPError, "404"),
        (Fault(*INFO, status=500), HfHubHTTPError, "500"),
        (Fault(*UPLOAD, status=403, times=None), HfHubHTTPError, "403"),
        (Fault(*UPLOAD, status=500, times=None), HfHubHTTPError, "500"),
        (Fault(*UPLOAD, drop_after=40, times=None), HTTPError, ""),
        (Fault(*PREUPLOAD, status=403, times=None), HfHubHTTPError, "403"),
        (Fault(*CARD, status=400), ValueError, "Invalid metadata in README.md"),
        (Fault(*CARD, status=502, page=b"<html>", times=None), ValueError, "Expecting value"),
        (Fault(*COMMIT, status=401), HfHubHTTPError, "401"),
        (Fault(*COMMIT, status=403), HfHubHTTPError, "403"),
        (Fault(*COMMIT, status=404), HfHubHTTPError, "404"),
        (Fault(*COMMIT, status=409, times=None), HfHubHTTPError, "409"),
        (Fault(*COMMIT, status=412, times=None), HfHubHTTPError, "412"),
        (Fault(*COMMIT, status=429, headers={"Retry-After": "86400"}), HfHubHTTPError, "429"),
        (Fault(*COMMIT, status=429, headers=BUSY, times=None), HfHubHTTPError, "429"),
        (Fault(*COMMIT, status=500, times=None), HfHubHTTPError, "500"),
        (Fault(*COMMIT, drop_after=10, times=None), HTTPError, ""),
    ],
    ids=name_of,
)
def test_a_push_that_cannot_be_completed_leaves_nothing(
    hub: HubServer,
    client: Client,
    delta_folder: Path,
    waits: list[float],
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    error: type[Exception],
    message: str,
) -> None:
    push_folder(delta_folder, "alice/delta")
    repo = hub.repos["alice/delta"]
    before = (repo.files(), dict(repo.branches))
    (delta_folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
    (delta_folder / "added.txt").write_text("more")
    kept = {path: path.read_bytes() for path in delta_folder.rglob("*") if path.is_file()}
    if "/create" in fault.path:  # an existing repo is asked for only after that
        hub.faults.append(Fault("GET", "/api/models/alice/delta", status=fault.status, times=None))
    for revision in (None, "new"):
        hub.faults.append(Fault(**vars(fault)))
        with pytest.raises(error, match=message):
            push_folder(delta_folder, "alice/delta", revision=revision)
        assert (repo.files(), repo.branches) == before
        hub.faults[-1].times = 0
    hub.faults.append(Fault(**vars(fault)))
    assert main(["push", str(delta_folder), "alice/delta"]) == 1
    shown = capsys.readouterr().err
    assert "error: " in shown
    assert "Traceback" not in shown
    assert kept == {path: path.read_bytes() for path in delta_folder.rglob("*") if path.is_file()}
    hub.faults.clear()
    push_folder(delta_folder, "alice/delta", revision="new")
    assert repo.files("new")["added.txt"] == b"more"


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(
    hub: HubServer, client: Client, delta_folder: Path, waits: list[float]
) -> None:
    push_folder(delta_folder, "alice/delta")
    (delta_folder / "added.txt").write_text("more")
    hub.faults.append(Fault(*COMMIT, lose_answer=True))
    with pytest.raises(HTTPError):
        push_folder(delta_folder, "alice/delta", create_pr=True)
    assert len(hub.repos["alice/delta"].pulls) == 1
    hub.faults.append(Fault(*COMMIT, status=429, headers=BUSY))
    push_folder(delta_folder, "alice/delta", create_pr=True)
    assert len(hub.repos["alice/delta"].pulls) == 2


def test_a_new_branch_goes_with_the_push_that_failed_unless_somebody_committed_to_it(
    hub: HubServer, client: Client, delta_folder: Path, waits: list[float]
) -> None:
    push_folder(delta_folder, "alice/delta")
    (delta_folder / "added.txt").write_text("more")

    def commit_and_refuse(repo: Repo) -> None:
        repo.edit("new", {"theirs.txt": b"x"})
        raise HubError(403, "as the test has it")

    hub.before_commit = commit_and_refuse
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(delta_folder, "alice/delta", revision="new")
    repo = hub.repos["alice/delta"]
    assert repo.files("new").keys() == {*repo.files(), "theirs.txt"}
    push_folder(delta_folder, "alice/delta", revision="new")
    assert {"theirs.txt", "added.txt"} <= repo.files("new").keys()


def test_a_busy_hub_is_no_conflict(hub: HubServer, client: Client, delta_folder: Path, waits: list[float]) -> None:
    """Of which a push onto one commit alone tells its caller at once."""
    head = push_folder(delta_folder, "alice/delta").oid
    (delta_folder / "added.txt").write_text("more")
    hub.faults.append(Fault(*COMMIT, status=429, headers={"Retry-After": "0"}))
    info = push_folder(delta_folder, "alice/delta", parent_commit=head)
    assert hub.repos["alice/delta"].branches["main"] == info.oid
    (delta_folder / "added.txt").write_text("yet more")
    before = len(hub.requests)
    with pytest.raises(HfHubHTTPError, match="412"):
        push_folder(delta_folder, "alice/delta", parent_commit=head)
    assert sum("/commit/" in request.path for request in hub.requests[before:]) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(*WEIGHTS, drop_after=5000),
        Fault(*WEIGHTS, drop_after=5000, times=3),
        Fault(*WEIGHTS, status=429, headers=BUSY),
        Fault(*CONFIG, drop_after=100),
        Fault(*CONFIG_HEAD, status=429, headers=BUSY),
        Fault(*CONFIG_HEAD, status=503),
        Fault(*WEIGHTS, delay=1.5),
    ],
    ids=name_of,
)
def test_a_load_that_can_be_completed_is(
    hub: HubServer, client: Client, published: Published, waits: list[float], fault: Fault
) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(published.family.base)
    client.patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults.append(Fault(**vars(fault)))
    model.load_adapter("alice/math", adapter_name="math")
    plain = MESwitchModelForCausalLM.from_pretrained(
        published.family.base, experts={"math": published.family.deltas["math"]}
    )
    plain.set_expert("math")
    assert torch.equal(logits(model), logits(plain))
    weights = (published.family.deltas["math"] / "adapter_model.safetensors").stat().st_size
    sent = sum(size for path, size in hub.downloads().items() if "adapter_config" not in path)
    lost = 5000 * (fault.times or 0) if fault.drop_after == 5000 else 0
    # What was sent to a client that had given up waiting may count as sent or not.
    assert sent == weights + lost or fault.delay, "nothing but what was lost is sent again"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault(*CONFIG_HEAD, status=401, times=None), DeltaFormatError, r"(?s)alice/code could not be fetched.*401"),
        (Fault(*CONFIG_HEAD, status=403, times=None), DeltaFormatError, r"could not be fetched"),
        (Fault(*CONFIG_HEAD, status=404, times=None), DeltaFormatError, r"alice/code"),
        (
            Fault(*CONFIG_HEAD, status=500, times=None),
            DeltaFormatError,
            r"alice/code is not in the cache and could not",
        ),
        (Fault(*CONFIG, drop_after=10, times=None), DeltaFormatError, r"adapter_config\.json of alice/code could not"),
        (Fault(*WEIGHTS, drop_after=0, times=None), DeltaFormatError, r"adapter_model\.safetensors of alice/code"),
        (Fault(*WEIGHTS, status=403, times=None), DeltaFormatError, r"adapter_model\.safetensors of alice/code"),
        (Fault(*WEIGHTS, status=404, times=None), DeltaFormatError, r"adapter_model\.safetensors of alice/code"),
        (Fault(*WEIGHTS, status=500, times=None), DeltaFormatError, r"adapter_model\.safetensors of alice/code"),
        (Fault(*WEIGHTS, status=429, headers=BUSY, times=None), DeltaFormatError, r"429"),
        (Fault(*WEIGHTS, delay=0.5, times=None), DeltaFormatError, r"adapter_model\.safetensors of alice/code"),
    ],
    ids=name_of,
)
def test_a_load_that_cannot_be_completed_leaves_nothing(
    hub: HubServer,
    client: Client,
    published: Published,
    waits: list[float],
    fault: Fault,
    error: type[Exception],
    message: str,
) -> None:
    model = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"})
    model.set_expert("math")
    before = logits(model)
    client.patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(fault_ := Fault(**vars(fault)))
    with pytest.raises(error, match=message):
        model.load_adapter("alice/code", adapter_name="code")
    assert model.experts == ["math"]
    assert torch.equal(logits(model), before)
    with pytest.raises(DeltaFormatError, match="in the local cache"):
        open_delta(resolve_delta("alice/code", local_files_only=True))
    fault_.times = 0
    model.load_adapter("alice/code", adapter_name="code")
    assert logits(model).shape[-1] > before.shape[-1]


def test_of_shards_those_that_are_missing_are_fetched_again_and_no_others(
    hub: HubServer, client: Client, published: Published, waits: list[float]
) -> None:
    base = AutoModelForCausalLM.from_pretrained("alice/base")
    base.load_adapter(str(published.family.deltas["math"]))
    base.push_to_hub("alice/sharded", max_shard_size="10KB")
    repo = hub.repos["alice/sharded"]
    shards = {name: file for name, file in repo.commits[repo.branches["main"]].files.items() if "-of-" in name}
    missing = sorted(shards)[1]
    before = len(hub.requests)
    hub.faults.append(Fault("GET", shards[missing].sha256, status=403, times=None))
    with pytest.raises(DeltaFormatError, match=rf"{missing} of alice/sharded.*could not be fetched"):
        resolve_delta("alice/sharded")
    with pytest.raises(DeltaFormatError, match="in the local cache"):
        resolve_delta("alice/sharded", local_files_only=True)
    hub.faults.clear()
    found = resolve_delta("alice/sharded")
    assert [path.name for path in found.weight_paths] == sorted(shards)
    sent = hub.downloads(since=before)
    assert {name: sent[file.sha256] for name, file in shards.items()} == {
        name: len(file.data) for name, file in shards.items()
    }


def test_what_is_not_there_is_named(published: Published, delta_folder: Path) -> None:
    load: Any = AutoModelForCausalLM.from_pretrained
    with pytest.raises(OSError, match="no-such"):
        load("alice/math", adapter_kwargs={"revision": "no-such"})
    with pytest.raises(DeltaFormatError, match="no-such"):
        MESwitchModelForCausalLM.from_pretrained(
            "alice/base", experts={"math": {"repo": "alice/math", "revision": "no-such"}}
        )
    with pytest.raises(RevisionNotFoundError):
        push_folder(delta_folder, "alice/x", revision="v", create_pr=True)
