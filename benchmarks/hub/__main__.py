"""Push and pull of a delta against plain huggingface_hub and a bare socket, over the loopback interface.

    python -m benchmarks.hub

The Hub is the tests' stand-in (``tests/hub_server.py``), in another process than the client; it speaks LFS, not Xet.
Random codes (speed only). The ways take turns, and what counts is the median of the ratios of each turn. The bytes
that a second expert costs are counted at the server. The result goes to ``benchmarks/results/hub_cpu.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import MistralConfig, PreTrainedConfig

from benchmarks.hub import client
from benchmarks.hub.bare_socket import BareServer
from benchmarks.load.random_family import SHAPES, random_expert, write_base, write_delta_repo
from benchmarks.provenance import device_name, provenance, write_result
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchConfig
from transformers_meswitch.cards import write_delta_card
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.inspection import full_copy_bytes

RESULT = Path(__file__).parents[1] / "results" / "hub_cpu.json"
#: Layers of Mistral-7B's width, and its vocabulary: at 2 bits, a delta of some 280 MB.
SHAPE = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=5, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
)  # fmt: skip
#: Name to the largest file that is written.
LAYOUTS = {"one file": "50GB", "shards": "50MB"}
PLAIN = {"push": "upload_folder", "pull": "snapshot_download"}
WAYS = ("ours", "plain", "bare")


def write_delta_of(folder: Path, config: PreTrainedConfig, bits: int, seed: int, max_shard_size: str) -> None:
    """Write a delta repo of random codes, with its card."""
    delta, tensors = random_expert(config, MESwitchConfig("me/base", bits=bits), seed)
    delta = dataclasses.replace(delta, base_model_name_or_path="me/base", expert_model_name_or_path=None)
    write_delta(folder, delta, tensors, max_shard_size=max_shard_size)
    write_delta_card(folder, delta, dense_bytes=full_copy_bytes(delta, config))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def counted(hub: HubServer, action: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What an action took, with the requests and bytes that the server counts for it."""
    before = len(hub.requests)
    cost = action()
    made = hub.requests[before:]
    return cost | {
        "requests": len(made),
        "sent_bytes": sum(r.received for r in made),
        "received_bytes": sum(r.sent for r in made),
    }


def measure_transfers(
    hub: HubServer, pool: ProcessPoolExecutor, folder: Path, layout: str, turns: int
) -> list[dict[str, Any]]:
    """Rows of pushes and pulls of one delta."""
    files = files_of(folder)
    weights = b"".join(data for name, data in sorted(files.items()) if name.endswith(".safetensors"))
    costs: dict[tuple[str, str], list[dict[str, float]]] = {(a, way): [] for a in PLAIN for way in WAYS}
    with BareServer(weights) as bare:

        def push(way: str) -> dict[str, float]:
            # Bytes that the Hub has already are not sent again.
            hub.blobs.clear()
            hub.repos.pop("me/delta", None)
            hub.add_repo("me/delta", {".gitattributes": b"*.safetensors filter=lfs\n"})
            cost = pool.submit(client.push, way, folder, "me/delta", bare.port).result()
            there = hub.repos["me/delta"].files()
            assert way == "bare" or all(there[name] == data for name, data in files.items() if name != "README.md")
            return cost

        def pull(way: str) -> dict[str, float]:
            hub.add_repo("me/delta", files)
            return pool.submit(client.pull, way, "me/delta", bare.port).result()

        for turn in range(-1, turns):  # the first one is not counted: imports, connections
            for name, action in (("push", push), ("pull", pull)):
                for way in WAYS if turn % 2 else reversed(WAYS):
                    cost = counted(hub, lambda action=action, way=way: action(way))
                    if turn >= 0:
                        costs[name, way].append(cost)
    return [row(layout, name, len(weights), {way: costs[name, way] for way in WAYS}) for name in PLAIN]


def row(layout: str, action: str, size: int, costs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """One row of the table: medians of each way, and of the ratios turn by turn."""

    def against(way: str, key: str) -> float:
        pairs = zip(costs[way], costs["ours"], strict=True)
        return round(statistics.median(theirs[key] / ours[key] for theirs, ours in pairs), 4)

    return {
        "layout": layout,
        "action": action,
        "bytes": size,
        "share_of_plain": against("plain", "seconds"),
        "share_of_plain_by_processor_time": against("plain", "cpu_seconds"),
        "share_of_bare_socket": against("bare", "seconds"),
        "megabytes_per_second": {
            way: round(size / 1e6 / statistics.median(c["seconds"] for c in found), 1) for way, found in costs.items()
        },
        "turns": costs,
    }


def measure_second_expert(hub: HubServer, pool: ProcessPoolExecutor, folder: Path) -> dict[str, Any]:
    """Bytes that the server sends for a second expert, and bytes of its delta."""
    config = SHAPES["deep"]
    write_base(folder / "base", config, "cpu")
    hub.add_repo("me/base", files_of(folder / "base"))
    for seed, name in enumerate(("first", "second")):
        write_delta_repo(folder / name, folder / "base", config, MESwitchConfig("me/base", bits=2), seed)
        hub.add_repo(f"me/{name}", files_of(folder / name))
    pool.submit(client.load_family, "me/base", {"first": "me/first"}).result()
    before = len(hub.requests)
    pool.submit(client.add_expert, "second", "me/second").result()
    files = files_of(folder / "second")
    wanted = [name for name in files if name.startswith("adapter_")]
    return {
        "first_load_bytes": sum(hub.downloads().values()) - sum(hub.downloads(since=before).values()),
        "second_expert_bytes": sum(hub.downloads(since=before).values()),
        "its_delta_bytes": sum(len(files[name]) for name in wanted),
    }


def measure(config: PreTrainedConfig, bits: int, turns: int) -> dict[str, Any]:
    """All rows."""
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        settings = hub.environment("me", f"{folder}/home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        rows = []
        spawn = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, settings), ProcessPoolExecutor(1, spawn) as pool:
            second = measure_second_expert(hub, pool, Path(folder))
            for layout, max_shard_size in LAYOUTS.items():
                delta = Path(folder, layout)
                write_delta_of(delta, config, bits, 0, max_shard_size)
                rows += measure_transfers(hub, pool, delta, layout, turns)
    return {"second_expert": second, "rows": rows}


def render(result: dict[str, Any]) -> str:
    """A Markdown table, and a line on the second expert."""
    lines = [
        "| what | layout | MB | ours, MB/s | plain, MB/s | bare socket, MB/s | share of plain | by processor time "
        "| share of a bare socket | requests, ours | plain |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        speeds = " | ".join(f"{r['megabytes_per_second'][way]:,.0f}" for way in WAYS)
        shares = (r["share_of_plain"], r["share_of_plain_by_processor_time"], r["share_of_bare_socket"])
        requests = (f"{r['turns'][way][-1]['requests']:.0f}" for way in ("ours", "plain"))
        lines.append(
            f"| {r['action']} against {PLAIN[r['action']]} | {r['layout']} | {r['bytes'] / 1e6:,.1f} | {speeds} "
            f"| {' | '.join(f'{share:.3f}' for share in shares)} | {' | '.join(requests)} |"
        )
    second = result["second_expert"]
    return "\n".join(
        [
            *lines,
            "",
            f"A second expert: {second['second_expert_bytes']:,} bytes sent, its delta is of "
            f"{second['its_delta_bytes']:,}; the base with the first expert took {second['first_load_bytes']:,}.",
        ]
    )


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="how often each way is measured; default: %(default)s")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT, help="default: benchmarks/results/hub_cpu.json")
    args = parser.parse_args()
    result = {
        **provenance("benchmarks.hub", device_name("cpu")),
        "codes": "random: for speed only",
        **measure(SHAPE, args.bits, args.turns),
    }
    write_result(args.output, result)
    print(render(result))


if __name__ == "__main__":
    main()
