"""The same items over a base that bitsandbytes holds in 4 or 8 bits, through the package's own layers.

Nothing is merged here: the quantised base's output and the delta's are added in every layer, as in use. Beside it
stands the expert's own checkpoint, quantised by bitsandbytes in its turn.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from transformers_meswitch import compress
from transformers_meswitch.inspection import inspect_delta
from transformers_meswitch.module_kinds import linear_sizes

from .cells import CellStore, ExpertId
from .data import held_out, load_split
from .experts import ExpertFolder, write_checkpoint
from .measures import to_bits
from .methods import OURS
from .methods.base import linear_names
from .tasks import TASKS
from .text import encode_prompts, item_texts

__all__ = ["measure_over_quantized_base"]

_EXPERT = "expert"


def measure_over_quantized_base(
    base: Path,
    work: Path,
    data: Path,
    experts: Sequence[ExpertId],
    methods: Sequence[str],
    *,
    bits: int,
    items: int,
    device: torch.device,
    calibration: int = 256,
    batch_size: int = 512,
    max_new_tokens: int = 10**6,
) -> None:
    """Measure what is missing of ``expert × method`` over a quantised base; cells are called ``METHOD@8bit-base``.

    Args:
        base: folder of the base's checkpoint.
        work: the work folder, in which the experts are.
        data: where the splits are.
        experts: trained experts.
        methods: ``"expert"``, or names of :data:`.methods.OURS`.
        bits: 4 (NF4) or 8 (int8).
        items: held-out items of each expert.
        device: where to run.
        calibration: training texts that the compression is calibrated on.
        batch_size: prompts at once.
        max_new_tokens: cuts the tasks' own limits down.
    """
    cells = CellStore(work / "cells")
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"items": items, "calibration": calibration}
    for expert in experts:
        task = TASKS[expert.task]
        test = held_out(load_split(data, task, "test"), expert.seed, items)
        train = load_split(data, task, "train")[:calibration]
        texts = item_texts(train)
        for name in methods:
            label = f"{name}@{bits}bit-base"
            if cells.has(expert, label, settings):
                continue
            values: dict[str, Any] = {}
            with tempfile.TemporaryDirectory() as scratch:
                weights = ExpertFolder(work / "experts" / str(expert)).load()
                checkpoint = write_checkpoint(base, weights, Path(scratch) / "expert")
                folder = checkpoint if name == _EXPERT else Path(scratch) / "delta"
                if name != _EXPERT:
                    started = time.perf_counter()
                    compress(base, checkpoint, folder, OURS[name], calibration=texts, device=device, progress=False)
                    values["seconds"] = round(time.perf_counter() - started, 2)
                model = _load(folder, bits, device)
                values |= _bytes(model, None if name == _EXPERT else folder)
            started = time.perf_counter()
            limit = min(task.max_new_tokens, max_new_tokens)
            answers = _answers(model, tokenizer, encode_prompts(tokenizer, test), limit, batch_size)
            right = [task.score(text, item) for text, item in zip(answers, test, strict=True)]
            values |= {
                "items": len(test),
                "right": sum(right),
                "correct": to_bits(right),
                "generation_seconds": round(time.perf_counter() - started, 2),
            }
            cells.write(expert, label, settings, values)
            print(f"{expert} {label}: {sum(right)} of {len(test)}", flush=True)


def _load(folder: Path, bits: int, device: torch.device) -> PreTrainedModel:
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    if bits == 4:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    else:
        how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=compute, device_map=str(device)
    )
    return model.eval()


def _bytes(model: PreTrainedModel, delta: Path | None) -> dict[str, Any]:
    """Bytes of the delta's tensors; of the quantised checkpoint's where there is no delta."""
    if delta is not None:
        found = inspect_delta(delta)
        linear_rows = [module for module in found.modules if module.kind == "linear"]
        inside = sum(module.bytes for module in linear_rows)
        weights = sum(math.prod(module.shape) for module in linear_rows)
        return {"linear_bytes": inside, "rest_bytes": found.tensor_bytes - inside, "linear_weights": weights}
    linears = linear_names(model)
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    total = sum(value.numel() * value.element_size() for key, value in state.items() if key != "lm_head.weight")
    prefixes = tuple(f"{name}." for name in linears)
    inside = sum(value.numel() * value.element_size() for key, value in state.items() if key.startswith(prefixes))
    weights = sum(math.prod(linear_sizes(model.get_submodule(name))) for name in linears)
    return {"linear_bytes": inside, "rest_bytes": total - inside, "linear_weights": weights}


@torch.inference_mode()
def _answers(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers by transformers' own generation, which reads the end token off the checkpoint."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        width = max(len(prompts[number]) for number in numbers)
        padding = [width - len(prompts[number]) for number in numbers]
        ids = [[end] * pad + prompts[number] for pad, number in zip(padding, numbers, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text.strip()
    return answers
