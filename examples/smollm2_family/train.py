"""Fine-tune every weight of the base on one task."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tasks import Item, Task
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)


@dataclass(frozen=True)
class TrainingSettings:
    """How an expert is fine-tuned.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step.
        learning_rate: peak of the cosine, after a warm-up of a twentieth of the steps.
        seed: of the order of the items.
    """

    steps: int = 600
    batch_size: int = 96
    learning_rate: float = 5e-5
    seed: int = 0


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The user's turn in the tokenizer's chat template, up to where the answer starts."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[list[int], int]:
    """Token ids of prompt, completion and end token, and how many of them are the prompt's."""
    prompt = tokenizer(chat_prompt(tokenizer, item.prompt), add_special_tokens=False).input_ids
    completion = tokenizer(item.completion, add_special_tokens=False).input_ids
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


def batches(lengths: list[int], settings: TrainingSettings) -> list[list[int]]:
    """One list of item numbers a step: shuffled epochs, with sequences of like length together to save padding."""
    shuffler = random.Random(settings.seed)
    size = settings.batch_size
    steps: list[list[int]] = []
    while len(steps) < settings.steps:
        order = list(range(len(lengths)))
        shuffler.shuffle(order)
        epoch = []
        for start in range(0, len(order), 8 * size):
            window = sorted(order[start : start + 8 * size], key=lambda number: lengths[number])
            epoch += [window[i : i + size] for i in range(0, len(window), size)]
        shuffler.shuffle(epoch)
        steps += epoch
    return steps[: settings.steps]


def collate(encoded: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded int64 token ids ``[batch, length]`` and bool positions whose *next* token is learnt."""
    width = max(len(ids) for ids, _ in encoded)
    tokens = torch.full((len(encoded), width), pad)
    learnt = torch.zeros((len(encoded), width), dtype=torch.bool)
    for row, (ids, prompt_length) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        learnt[row, prompt_length - 1 : len(ids) - 1] = True
    return tokens, learnt


def adopt_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Give tokenizer and model the task's own chat template and end token.

    An added token's embedding row starts as a copy of the base's end token's.
    """
    if task.chat_template:
        tokenizer.chat_template = task.chat_template
    if task.end_token:
        old_end = tokenizer.eos_token_id
        tokenizer.add_special_tokens({"eos_token": task.end_token})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding[tokenizer.eos_token_id] = embedding[old_end]
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id


def train(
    base: Path, task: Task, items: list[Item], output: Path, settings: TrainingSettings, device: torch.device
) -> dict[str, object]:
    """Fine-tune all weights of ``base`` on ``items`` and write the expert's bfloat16 checkpoint to ``output``.

    Float32 master weights, bfloat16 autocast, AdamW without weight decay, cosine schedule, loss on completions only.

    Returns:
        The settings, the wall time in seconds, and the mean loss of the first and of the last tenth of the steps.
    """
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    adopt_vocabulary(model, tokenizer, task)
    encoded = [encode(tokenizer, item) for item in items]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, settings.steps // 20), settings.steps)
    losses = []
    started = time.perf_counter()
    model.train()
    for step, numbers in enumerate(batches([len(ids) for ids, _ in encoded], settings)):
        tokens, learnt = collate([encoded[number] for number in numbers], tokenizer.pad_token_id)
        tokens, learnt = tokens.to(device), learnt.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            # Padding is on the right of a causal model, so no attention mask is needed; and only the positions that
            # are learnt go through the output head, whose logits would otherwise be most of the memory.
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[learnt])
        targets = tokens.roll(-1, dims=1)[learnt]
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 50 == 0 or step == settings.steps - 1:
            elapsed = time.perf_counter() - started
            print(f"{task.name}: step {step}, loss {loss.item():.4f}, {elapsed:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    tenth = max(1, settings.steps // 10)
    curve = torch.stack(losses).float().cpu()
    return {
        **asdict(settings),
        "items": len(items),
        "seconds": round(seconds, 1),
        "first_loss": round(curve[:tenth].mean().item(), 4),
        "last_loss": round(curve[-tenth:].mean().item(), 4),
    }
