"""Time of a decode step of a whole model with experts, and their memory.

    python -m benchmarks.decode --shape mistral-7b --device cuda
    python -m benchmarks.decode --shape mistral-7b --device cuda --compile
    python -m benchmarks.decode --shape smollm2-135m --device cpu --dtype float32 --experts 2

Random weights (speed and memory only). A step is a CUDA graph over a static cache. Peers in the same run: the plain
base under the same graph, and a mixed batch of rank-64 LoRA adapters through PEFT, captured and called. The limit is
the time to read the weights of base and deltas once, as fast as a plain read of this device's memory runs. The result
goes to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.decode.step import DecodeStep, median_ms, paired_ms
from benchmarks.load.random_family import SHAPES, random_expert
from benchmarks.provenance import device_name, provenance, write_result
from benchmarks.timing import attempt
from transformers_meswitch import MESwitchConfig
from transformers_meswitch.peft_method.naming import LEAF_PREFIX, module_key

RESULTS = Path(__file__).parents[1] / "results"
_LORA_RANK = 64
_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_model(config: PreTrainedConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weight_bytes(model: torch.nn.Module, *parts: str) -> int:
    """Bytes of the parameters whose names hold any of the parts; of all but the input embedding, if none is given.

    Of an input embedding a step reads a row a token.
    """
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name and (not parts or any(part in name for part in parts))
    )


def step_row(
    what: str,
    model: PreTrainedModel,
    rows: int,
    read: int,
    bandwidth: float,
    *,
    graph: bool,
    compiled: bool = False,
    plain: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Time of a step, beside the least that reading ``read`` bytes takes; a step that cannot be taken says why.

    Given a plain base to compare with, their steps take turns.
    """

    def measured() -> dict[str, Any]:
        step = DecodeStep(model, rows, graph=graph, compiled=compiled)
        limit = {"limit_milliseconds": read / bandwidth * 1e3} if bandwidth else {}
        if plain is None:
            return {"milliseconds": median_ms(step, model.device), **limit}
        base = DecodeStep(plain, rows, graph=graph, compiled=compiled)
        own, of_base = paired_ms(step, base, model.device)
        return {"milliseconds": own, "base_milliseconds": of_base, **limit}

    return attempt({"what": what, "rows": rows, "read_bytes": read}, measured)


def measure(
    config: PreTrainedConfig,
    device: str,
    experts: int,
    request: MESwitchConfig,
    rows_bits: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
) -> dict[str, Any]:
    """The rows of the table, and the memory of base and experts.

    Compiled steps are of the plain base and of experts alone, without the LoRA adapters.
    """
    cuda = device == "cuda"
    bandwidth = 0.0
    if cuda:
        from benchmarks.kernels.timing import read_bandwidth

        bandwidth = read_bandwidth()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model: Any = random_model(config, device, dtype)
    base_bytes = weight_bytes(model)
    row = functools.partial(step_row, bandwidth=bandwidth, graph=cuda, compiled=compiled)
    rows = [row(f"the plain base, {count} rows", model, count, base_bytes) for count in (1, experts)]
    if not cuda:
        # A processor's clock and neighbours change within a second, and it has the memory for a second base.
        row = functools.partial(row, plain=random_model(config, device, dtype))
    names = [f"expert{number}" for number in range(experts)]
    for seed, name in enumerate(names):
        delta, tensors = random_expert(config, request, seed, rows_bits=rows_bits, device=device)
        # From the host, as from a file, so that the device does not hold an expert twice.
        tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
        model.load_adapter(adapter_name=name, peft_config=delta, adapter_state_dict=tensors)
        del tensors
    memory = torch.cuda.max_memory_allocated() if cuda else None
    one = weight_bytes(model, f".{LEAF_PREFIX}.{module_key(names[0])}.")
    model.set_expert(names[0])
    rows.append(row("one expert, 1 row", model, 1, base_bytes + one))
    rows.append(row(f"one expert, {experts} rows", model, experts, base_bytes + one))
    with model._meswitch_switch.rows(names):
        rows.append(row(f"{experts} experts, a row each", model, experts, base_bytes + experts * one))
    del model
    if cuda:
        torch.cuda.empty_cache()
    if not compiled:
        rows += lora_rows(config, device, experts, bandwidth, dtype)
    return {
        "rows": rows,
        "read_bandwidth_tb_per_second": bandwidth / 1e12 or None,
        "peak_bytes_of_base_and_experts": memory,
    }


def lora_rows(
    config: PreTrainedConfig, device: str, experts: int, bandwidth: float, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """PEFT's mixed batch over as many LoRA adapters of the same base."""
    base: Any = random_model(config, device, dtype)
    read = weight_bytes(base)
    lora = LoraConfig(r=_LORA_RANK, target_modules=_LORA_TARGETS, init_lora_weights=False)
    names = [f"lora{number}" for number in range(experts)]
    model: Any = get_peft_model(base, lora, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.to(dtype)
    read += weight_bytes(model, ".lora_A.", ".lora_B.")
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, adapter_names=names, **kwargs)
    what = f"{experts} LoRA adapters of rank {_LORA_RANK}, a row each, PEFT"
    return [
        step_row(f"{what}, {'a graph' if graph else 'called'}", model, experts, read, bandwidth, graph=graph)
        for graph in ((True, False) if device == "cuda" else (False,))
    ]


def add_ratios(rows: list[dict[str, Any]], experts: int) -> None:
    """Time over that of the plain base with as many rows, and of running the experts' full models in turn."""
    base = {row["rows"]: row.get("milliseconds") for row in rows if row["what"].startswith("the plain base")}
    for row in rows:
        if "milliseconds" not in row:
            continue
        of_base = row.get("base_milliseconds") or base.get(row["rows"])
        if of_base:
            row["ratio_to_base"] = row["milliseconds"] / of_base
        if "a row each" in row["what"] and base.get(1):
            row["full_models_in_turn"] = experts * base[1] / row["milliseconds"]


def render(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = ["| what | step, ms | tokens/s | ÷ plain base | ÷ limit of the memory | full models in turn ÷ this |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        if "unavailable" in row:
            lines.append(f"| {row['what']} | unavailable: {row['unavailable'].splitlines()[0]} | | | | |")
            continue
        cells = [
            f"{row['milliseconds']:.2f}",
            f"{1e3 * row['rows'] / row['milliseconds']:,.0f}",
            f"{row['ratio_to_base']:.3f}" if "ratio_to_base" in row else "",
            f"{row['milliseconds'] / row['limit_milliseconds']:.2f}" if "limit_milliseconds" in row else "",
            f"{row['full_models_in_turn']:.1f}" if "full_models_in_turn" in row else "",
        ]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deep")
    parser.add_argument("--layers", type=int, help="default: the shape's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--embedding-bits", type=int, default=3)
    parser.add_argument(
        "--compile", action="store_true", help="compile the steps of base and experts; leaves out the LoRA adapters"
    )
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/decode_<shape>_<device>[_float32][_compiled].json"
    )
    args = parser.parse_args()
    config = SHAPES[args.shape]
    if args.layers is not None:
        config.num_hidden_layers = args.layers
    request = MESwitchConfig(bits=args.bits)
    dtype = getattr(torch, args.dtype)
    found = measure(
        config, args.device, args.experts, request, args.embedding_bits, dtype=dtype, compiled=args.compile
    )
    add_ratios(found["rows"], args.experts)
    result = {
        **provenance("benchmarks.decode", device_name(args.device)),
        "weights": "random: for time and memory only",
        "dtype": args.dtype,
        "experts": args.experts,
        "compiled": args.compile,
        **found,
    }
    name = f"decode_{args.shape}_{args.device}{'_float32' * (dtype == torch.float32)}{'_compiled' * args.compile}.json"
    write_result(args.output or RESULTS / name, result)
    print(render(found["rows"]))
    if found["peak_bytes_of_base_and_experts"] is not None:
        print(f"\nBase and {args.experts} experts: {found['peak_bytes_of_base_and_experts'] / 1e9:.2f} GB at most.")


if __name__ == "__main__":
    main()
