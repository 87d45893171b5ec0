"""Fine-tune every weight of the base on one task, as quickly as one accelerator can."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from .family_example import TrainingSettings, batches, collate
from .tasks import Item
from .text import encode_items

__all__ = ["STRENGTHS", "Strength", "compile_layers", "compiled_anew", "fine_tune"]


@dataclass(frozen=True)
class Strength:
    """How far an expert is trained from its base: steps of ``batch_size`` sequences, and the peak learning rate."""

    steps: int
    learning_rate: float
    batch_size: int = 96


#: ``light`` is an ordinary fine-tune. ``heavy`` takes half as many steps again at five times the learning rate: its
#: deltas are several times larger, which is where delta compression is known to fail.
STRENGTHS = {"light": Strength(400, 1e-4), "heavy": Strength(600, 5e-4)}

#: Sequences are padded to a multiple of this, so that few shapes occur.
_PAD_TO = 32


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers of a model, one compilation for all of them."""
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)


@contextmanager
def compiled_anew() -> Iterator[None]:
    """What runs inside compiles for itself, and for nothing that was compiled before.

    Code for any shape is still tuned to the first one it sees, and sums in another order when tuned to another. So an
    expert's weights would depend on which expert the process trained first. To forget the process's code is not
    enough: the caches on disk are looked up by the graph alone, without the shape that its code was tuned to.
    """
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    strength: Strength,
    *,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Train all weights of ``model`` (float32, on its device) in place.

    Float32 master weights, bfloat16 autocast, fused AdamW without weight decay, warm-up and cosine. Only the tokens of
    completions are learnt, and only their positions go through the output head, whose 49,152 logits a position would
    otherwise be most of the work.

    Args:
        model: the base; trained in place.
        tokenizer: its tokenizer.
        items: what to learn; each is seen about equally often.
        strength: steps, batch size and learning rate.
        seed: of the order of the items.
        progress: whether to show a progress bar.

    Returns:
        The settings, the wall time in seconds, the tokens seen and the mean loss of the first and of the last tenth.
    """
    torch.manual_seed(seed)
    device = model.device
    encoded = encode_items(tokenizer, items)
    settings = TrainingSettings(strength.steps, strength.batch_size, strength.learning_rate, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=strength.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, strength.steps // 20), strength.steps)
    losses, tokens_seen = [], 0
    started = time.perf_counter()
    model.train()
    order = batches([len(ids) for ids, _ in encoded], settings)
    for numbers in tqdm(order, desc="Training", disable=not progress, mininterval=5):
        tokens, learnt = collate([encoded[number] for number in numbers], tokenizer.pad_token_id)
        short = -tokens.shape[1] % _PAD_TO
        tokens = F.pad(tokens, (0, short), value=tokenizer.pad_token_id).to(device, non_blocking=True)
        # As indices, which the host knows: a mask would make it wait for the device at every step.
        where = learnt.flatten().nonzero().squeeze(1)
        row, column = where // learnt.shape[1], where % learnt.shape[1]
        at = (row * tokens.shape[1] + column).to(device, non_blocking=True)
        tokens_seen += tokens.numel()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            # Padding is on the right of a causal model, so no attention mask is needed.
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[at])
        loss = F.cross_entropy(logits.float(), tokens.flatten()[at + 1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    curve = torch.stack(losses).float().cpu()
    tenth = max(1, strength.steps // 10)
    return {
        **asdict(strength),
        "seed": seed,
        "items": len(items),
        "seconds": round(time.perf_counter() - started, 1),
        "padded_tokens": tokens_seen,
        "first_loss": round(curve[:tenth].mean().item(), 4),
        "last_loss": round(curve[-tenth:].mean().item(), 4),
    }
