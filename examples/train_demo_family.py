"""Train the demo family: a tiny base, three full fine-tunes of it, their 2-bit deltas, and the family repo.

    python examples/train_demo_family.py --output build/demo --family transformers_meswitch/demo/assets/family

The stages can be run one at a time; each reads what the ones before it left in the output folder:

=========  ==========================================================================================
base       a 0.9 M parameter Llama learns to write: it repeats records, and knows month names and JSON
experts    all weights of the base are tuned on one task each; one expert also adds tokens of its own
compress   each expert becomes a 2-bit delta, calibrated on its training prompts
bundle     base, deltas and ``config.json`` are laid out as a family repo
route      a router learns which expert answers which record
=========  ==========================================================================================

The same seed gives the same files on a CPU. One core takes about 15 minutes. For better experts train longer, which a
GPU does in a few minutes: ``--steps 6000 --expert-steps 2000``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_meswitch import (
    HeadRouter,
    MESwitchConfig,
    MESwitchExpertConfig,
    MESwitchFamilyConfig,
    MESwitchModelForCausalLM,
    compress,
)
from transformers_meswitch.demo.tasks import MONTHS, TASKS, Task, expert_for, prompts, random_record

#: The base as the deltas name it, seen from their own folders: the family carries it, and no Hub id is its.
BASE_IN_FAMILY = "../../base"
#: Records that the router learns from.
ROUTER_EXAMPLES = 600
#: The expert with tokens, a chat template and an end-of-answer token of its own.
EXPERT_WITH_OWN_TOKENS = "json"
SPECIAL = {"pad": "<|pad|>", "unk": "<|unk|>", "bos": "<|start|>", "eos": "<|end|>"}
USER, ANSWER = "<|user|>", "<|answer|>"
OWN_ANSWER, OWN_END = "<|json|>", "<|done|>"


def chat_template(answer: str, end: str) -> str:
    """A one-turn chat template in which ``answer`` opens the assistant's turn and ``end`` closes it."""
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{USER}{{{{ message['content'] }}}}"
        "{% else %}"
        f"{answer}{{{{ message['content'] }}}}{end}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}" + answer + "{% endif %}"
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character: printable ASCII and six special tokens."""
    special = [*SPECIAL.values(), USER, ANSWER]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(ANSWER, SPECIAL["eos"]),
    )


def add_own_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give a tokenizer two more tokens and the chat template that uses them."""
    tokenizer.add_special_tokens({"additional_special_tokens": [OWN_ANSWER, OWN_END]})
    tokenizer.eos_token = OWN_END
    tokenizer.chat_template = chat_template(OWN_ANSWER, OWN_END)
    return tokenizer


def build_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.9 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def conversation(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str | None = None) -> str:
    """A conversation as text: up to the opening of the answer, or with it."""
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


Example = tuple[str, str]
"""Context, of which no loss is taken, and the text to learn."""


def base_examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Example]:
    """What the base reads: repeated records in the chat format, and loose facts on dates and JSON; never a task."""
    rng = random.Random(seed)
    for prompt in prompts(held_out=False, seed=seed):
        kind = rng.random()
        if kind < 0.7:
            yield "", conversation(tokenizer, prompt, prompt)
            continue
        record = random_record(rng)
        month = record.due.month
        if kind < 0.85:
            text = f"Month {month:02} is {MONTHS[month - 1]}, day {record.due.day:02} is {record.due.day}."
        else:
            text = json.dumps({"year": record.due.year, "town": record.name}, separators=(",", ":"))
        yield "", SPECIAL["bos"] + text + SPECIAL["eos"]


def task_examples(tokenizer: PreTrainedTokenizerFast, task: Task, seed: int) -> Iterator[Example]:
    """What an expert is tuned on: training prompts of its task and their answers."""
    for prompt in prompts(held_out=False, seed=seed):
        context = conversation(tokenizer, prompt)
        yield context, conversation(tokenizer, prompt, task.answer(prompt)).removeprefix(context)


def batches(
    tokenizer: PreTrainedTokenizerFast, examples: Iterator[Example], batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches: ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[batch_size, length]``."""
    while True:
        chunk = list(islice(examples, batch_size))
        encoded = tokenizer(
            [context + text for context, text in chunk], padding=True, padding_side="right", return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        context_lengths = torch.tensor(
            [len(tokenizer(context)["input_ids"]) if context else 0 for context, _ in chunk]
        )
        ignored = (mask == 0) | (torch.arange(ids.shape[1]) < context_lengths[:, None])
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ignored, -100)}


def train(
    model: LlamaForCausalLM,
    data: Iterator[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    title: str,
) -> None:
    """Tune all weights with AdamW: 5 % warm-up, then a cosine to zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    with tqdm(range(steps), desc=title) as bar:
        for _ in bar:
            batch = {name: tensor.to(model.device) for name, tensor in next(data).items()}
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: int = 200) -> dict[str, float]:
    """Share of held-out prompts whose greedy answer is exactly right, by task."""
    held_out = list(islice(prompts(held_out=True, seed=1), items))
    inputs = tokenizer([conversation(tokenizer, p) for p in held_out], padding=True, return_tensors="pt")
    tokens = model.generate(
        **{name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")},
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {task.name: sum(map(task.is_right, held_out, answers)) / items for task in TASKS.values()}


def report(title: str, scores: dict[str, float]) -> None:
    """Print one line of held-out exact match."""
    print(f"{title:24}", "  ".join(f"{name} {score:6.1%}" for name, score in scores.items()), flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a checkpoint in bfloat16 with its tokenizer."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load(directory: Path, device: str) -> LlamaForCausalLM:
    """Read a checkpoint in float32, onto a device."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)


def make_base(args: argparse.Namespace) -> None:
    """Stage ``base``: train the base from random weights and save it."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_base(tokenizer).to(args.device)
    print(f"base: {model.num_parameters():,} parameters on {args.device}")
    data = batches(tokenizer, base_examples(tokenizer, args.seed), args.batch_size)
    train(model, data, steps=args.steps, learning_rate=args.lr, title="base")
    save(model, tokenizer, args.output / "base")
    report("base", exact_match(load(args.output / "base", args.device), tokenizer))


def make_experts(args: argparse.Namespace) -> None:
    """Stage ``experts``: tune the saved base on each task and save the full fine-tunes."""
    for number, task in enumerate(TASKS.values()):
        torch.manual_seed(args.seed)
        tokenizer = AutoTokenizer.from_pretrained(args.output / "base")
        model = load(args.output / "base", args.device)
        if task.name == EXPERT_WITH_OWN_TOKENS:
            tokenizer = add_own_tokens(tokenizer)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.config.eos_token_id = tokenizer.eos_token_id
        data = batches(tokenizer, task_examples(tokenizer, task, args.seed + 100 + number), args.batch_size)
        train(model, data, steps=args.expert_steps, learning_rate=args.expert_lr, title=task.name)
        save(model, tokenizer, args.output / "full" / task.name)
        report(
            f"{task.name}, full precision", exact_match(load(args.output / "full" / task.name, args.device), tokenizer)
        )


def make_deltas(args: argparse.Namespace) -> None:
    """Stage ``compress``: write each expert's delta repo, calibrated on conversations of its training split."""
    # Embedding rows as they are: the bundled family's are 7 % of its deltas.
    config = MESwitchConfig(bits=args.bits, salient_channels=args.salient_channels, embedding_bits=None)
    for task in TASKS.values():
        expert = args.output / "full" / task.name
        tokenizer = AutoTokenizer.from_pretrained(expert)
        examples = islice(task_examples(tokenizer, task, args.seed + 200), 256)
        directory = compress(
            args.output / "base",
            expert,
            args.family / "experts" / task.name,
            config,
            calibration=[context + text for context, text in examples],
        )
        delta = MESwitchExpertConfig.from_pretrained(directory)
        delta.base_model_name_or_path = BASE_IN_FAMILY
        delta.save_pretrained(directory)


def make_family(args: argparse.Namespace) -> None:
    """Stage ``bundle``: put the base and ``config.json`` beside the deltas."""
    shutil.copytree(args.output / "base", args.family / "base", dirs_exist_ok=True)
    experts = {name: f"./experts/{name}" for name in TASKS}
    MESwitchFamilyConfig("./base", experts=experts).save_pretrained(args.family)
    # Saved in place, the family gains its tokenizer, generation config and card.
    MESwitchModelForCausalLM.from_pretrained(args.family).save_pretrained(args.family)
    size = sum(file.stat().st_size for file in args.family.rglob("*") if file.is_file())
    print(f"family: {size:,} bytes in {args.family}")


def make_router(args: argparse.Namespace) -> None:
    """Stage ``route``: fit the family's router to records of the training split."""
    model = MESwitchModelForCausalLM.from_pretrained(args.family)
    examples: dict[str, list[str]] = {}
    for prompt in islice(prompts(held_out=False, seed=args.seed + 300), ROUTER_EXAMPLES):
        examples.setdefault(expert_for(prompt), []).append(prompt)
    model.set_router(HeadRouter.train(model, examples))
    model.save_pretrained(args.family)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "base": make_base,
    "experts": make_experts,
    "compress": make_deltas,
    "bundle": make_family,
    "route": make_router,
}


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--family", type=Path, help="folder of the family repo (default: OUTPUT/family)")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the base")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of the base")
    parser.add_argument("--expert-steps", type=int, default=700, help="steps of each expert")
    parser.add_argument("--expert-lr", type=float, default=5e-4, help="peak learning rate of the experts")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--salient-channels", type=int, default=8)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.family = args.family or args.output / "family"
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
