"""A Hub on the loopback interface, and this process as its client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.fixtures_models import TinyFamily
from tests.hub_server import HubServer
from transformers_meswitch.cards import delta_card
from transformers_meswitch.configuration import MESwitchExpertConfig


@dataclass
class Client:
    """huggingface_hub in this process: who it is, where it caches, whether it may use the network."""

    patch: pytest.MonkeyPatch
    cache: Path

    def become(self, user: str | None) -> None:
        """Act as another user, or as nobody."""
        if user is None:
            self.patch.delenv("HF_TOKEN", raising=False)
        else:
            self.patch.setenv("HF_TOKEN", f"hf_{user}")

    def go_offline(self) -> None:
        self.patch.setattr(constants, "HF_HUB_OFFLINE", True)

    def forget(self, name: str = "cache-2") -> None:
        """Use a cache in which nothing is."""
        self.cache = self.cache.parent / name
        self.patch.setattr(constants, "HF_HUB_CACHE", str(self.cache))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """As with ``HF_ENDPOINT`` and the others, which are read at import: ``alice`` with a cache of her own."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    # Newer releases of transformers keep a client of their own.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    found = Client(monkeypatch, tmp_path / "unused")
    found.become("alice")
    found.forget("cache")
    yield found
    close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that retries wished to wait, without waiting: of huggingface_hub and of this package."""
    asked: list[float] = []
    patched = SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    patched.sleep = asked.append
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "transformers_meswitch.hub_commit"):
        monkeypatch.setattr(f"{module}.time", patched)
    return asked


@pytest.fixture
def delta_folder(tmp_path: Path) -> Path:
    """A folder that is a delta for everything but reading its tensors."""
    folder = tmp_path / "delta"
    folder.mkdir()
    module = {"kind": "linear", "out_features": 8, "in_features": 16, "bits": 2}
    config = MESwitchExpertConfig(base_model_name_or_path="alice/base", modules={"model.layers.0.mlp.up_proj": module})
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "alice/base"}))
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
    (folder / "README.md").write_text(delta_card(config, total_bytes=100, dense_bytes=256))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


@dataclass
class Published:
    """The tiny family on the Hub: ``alice/base``, and the delta repos ``alice/math`` and ``alice/code``."""

    family: TinyFamily

    def files(self, name: str) -> dict[str, bytes]:
        folder = self.family.base if name == "base" else self.family.deltas[name]
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if name != "base":
            config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "alice/base"}
            files["adapter_config.json"] = json.dumps(config).encode()
        return files


@pytest.fixture
def published(hub: HubServer, client: Client, tiny_family: TinyFamily) -> Published:
    found = Published(tiny_family)
    for name in ("base", "math", "code"):
        hub.add_repo(f"alice/{name}", found.files(name))
    return found
