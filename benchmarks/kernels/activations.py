"""Error of the decode kernels' numerics on a model's own activations, projection by projection.

    python -m benchmarks.kernels.activations --base SMOLLM2

A base reads the built-in calibration texts; what goes into its linears at random tokens, each text's first among
them, is multiplied by random deltas of 2 bits. Their salient channels are those of the most energy, which is what the
rule of the package (reconstruction error) comes to for a delta that is as large everywhere. The error is that of the
delta's own output in the dtype of the activations, relative to its norm, against float64; 0.0017 of it is the rounding
of a bfloat16 output. The kernels' sums are exact or in float32, so what they lose is what they round activations to,
and that is done here in plain torch, on any device. The result goes to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.provenance import device_name, provenance, write_result
from benchmarks.quality.serving import LEVELS, rounded_activations
from meswitch_kernels import Numerics
from transformers_meswitch.compression.calibration import DEFAULT, read_samples
from transformers_meswitch.compression.layered_model import decoder_layers

__all__ = ["linear_inputs", "measure", "numerics_errors"]

RESULT = Path(__file__).parents[1] / "results" / "numerics_smollm2.json"
_BITS, _SALIENT_CHANNELS = 2, 16


@torch.no_grad()
def linear_inputs(
    model: PreTrainedModel, sequences: Sequence[Tensor], layers: Sequence[int], tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into the linears of some layers.

    Args:
        model: the base.
        sequences: token ids, ``[length]`` each.
        layers: numbers of decoder layers.
        tokens: rows to keep of each sequence: the first token and random ones.

    Returns:
        By the linear's name, activations ``[rows, in]`` and the energy of each channel over all tokens, ``[in]``.
    """
    found = decoder_layers(model)
    assert found is not None
    rows: dict[str, list[Tensor]] = defaultdict(list)
    energy: dict[str, Tensor] = {}
    kept = torch.empty(0)

    def hook(name: str) -> Any:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            rows[name].append(x[kept.to(x.device)])
            energy[name] = energy.get(name, 0) + x.float().square().sum(dim=0)

        return take

    handles = [
        module.register_forward_pre_hook(hook(f"{number}.{name}"))
        for number in layers
        for name, module in found[1][number].named_modules()
        if isinstance(module, nn.Linear)
    ]
    generator = torch.Generator().manual_seed(0)
    for ids in sequences:
        others = 1 + torch.randperm(len(ids) - 1, generator=generator)[: tokens - 1]
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), others])
        model(ids.unsqueeze(0).to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(parts), energy[name]) for name, parts in rows.items()}


def numerics_errors(x: Tensor, energy: Tensor, out: int) -> Iterator[tuple[Numerics, float, float]]:
    """The error of each way to multiply by a random delta ``[out, in]``, over all rows and of the worst row.

    Args:
        x: ``[rows, in]``, what a linear is given.
        energy: ``[in]``, by which the delta's salient channels are chosen.
        out: output channels.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    levels = torch.randint(0, 2**_BITS, (out, x.shape[1]), generator=generator, device=x.device)
    delta = levels.double() - (2**_BITS - 1) / 2
    salient = energy.topk(min(_SALIENT_CHANNELS, x.shape[1])).indices
    expected = x.double() @ delta.T
    for numerics in get_args(Numerics):
        used = x if numerics == "exact" else rounded_activations(x.double(), LEVELS[numerics], salient)
        y = (used.double() @ delta.T).to(x.dtype)
        lost = y.double() - expected
        yield numerics, float(lost.norm() / expected.norm()), float((lost.norm(dim=1) / expected.norm(dim=1)).max())


def measure(model: PreTrainedModel, sequences: Sequence[Tensor], layers: Sequence[int], tokens: int) -> dict[str, Any]:
    """Of each projection and numerics: the median error over the layers, and the worst layer's, with its worst row."""
    found: dict[str, dict[str, list[tuple[float, float, int]]]] = defaultdict(lambda: defaultdict(list))
    decoder = decoder_layers(model)
    assert decoder is not None
    for name, (x, energy) in linear_inputs(model, sequences, layers, tokens).items():
        number, projection = name.split(".", 1)
        module = decoder[1].get_submodule(name)
        assert isinstance(module, nn.Linear)
        for numerics, error, worst_row in numerics_errors(x, energy, module.out_features):
            found[projection][numerics].append((error, worst_row, int(number)))
    return {
        projection: {numerics: _summary(errors) for numerics, errors in own.items()}
        for projection, own in found.items()
    }


def _summary(errors: list[tuple[float, float, int]]) -> dict[str, Any]:
    worst, worst_row, layer = max(errors)
    return {
        "median": statistics.median(error for error, _, _ in errors),
        "worst": worst,
        "worst_layer": layer,
        "worst_row_of_it": worst_row,
    }


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each sequence")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    texts = islice(read_samples(DEFAULT, tokenizer), args.sequences)
    sequences = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    layers = args.layers or list(range(model.config.num_hidden_layers))
    projections = measure(model, sequences, layers, args.tokens)
    result = {
        **provenance("benchmarks.kernels.activations", device_name(device)),
        "layers": layers,
        "rows": sum(min(args.tokens, len(ids)) for ids in sequences),
        "projections": projections,
    }
    write_result(args.output, result)
    ways = get_args(Numerics)
    print(f"| projection | {' | '.join(ways)} |\n|---|{'---:|' * len(ways)}")
    for projection, found in projections.items():
        cells = (
            f"{row['median']:.2%}, {row['worst']:.2%} (layer {row['worst_layer']})"
            for row in (found[way] for way in ways)
        )
        print(f"| {projection} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
