"""What is measured, in a process of its own: the server's threads would share this one's interpreter lock.

huggingface_hub reads where the Hub is when it is imported, so the process starts with the variables of
:meth:`tests.hub_server.HubServer.environment`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from benchmarks.hub.bare_socket import receive, send
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.delta_format.reader import open_delta, resolve_delta
from transformers_meswitch.hub import push_folder

__all__ = ["add_expert", "load_family", "pull", "push"]

_MODEL: list[Any] = []


def _cost(action: Callable[[], Any]) -> dict[str, float]:
    start, processor = time.perf_counter(), time.process_time()
    action()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}


def push(how: str, folder: Path, repo_id: str, port: int) -> dict[str, float]:
    """Push a folder to a repo that is there.

    Args:
        how: ``ours``, ``plain`` (``upload_folder``) or ``bare`` (the weights alone, to the bare server).
        folder: the delta repo.
        repo_id: the repo.
        port: of the bare server.
    """
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: push_folder(folder, repo_id),
        "plain": lambda: HfApi().upload_folder(repo_id=repo_id, folder_path=folder),
        "bare": lambda: [send(path, port) for path in folder.glob("*.safetensors")],
    }
    return _cost(actions[how])


def pull(how: str, repo_id: str, port: int) -> dict[str, float]:
    """Pull a repo into an empty cache, which is removed after the clock has stopped.

    Args:
        how: ``ours`` (fetched, opened and its headers checked), ``plain`` (``snapshot_download``) or ``bare``.
        repo_id: the repo.
        port: of the bare server.
    """
    cache = Path(tempfile.mkdtemp())
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: open_delta(resolve_delta(repo_id, cache_dir=cache)),
        "plain": lambda: snapshot_download(repo_id, cache_dir=cache),
        "bare": lambda: receive(cache / "weights", port),
    }
    try:
        return _cost(actions[how])
    finally:
        shutil.rmtree(cache)


def load_family(base: str, experts: dict[str, str]) -> None:
    """Load a base with experts from the Hub, for :func:`add_expert`."""
    _MODEL[:] = [MESwitchModelForCausalLM.from_pretrained(base, experts=experts)]


def add_expert(name: str, repo_id: str) -> None:
    """Add an expert from the Hub to the family that is loaded."""
    _MODEL[0].load_adapter(repo_id, adapter_name=name)
