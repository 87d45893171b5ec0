"""Train the experts that are missing and measure the cells that are missing, until done or out of time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transformers_meswitch.compression.calibration import DEFAULT, read_samples

from .calibration import collect_moments
from .cells import CellStore, ExpertId
from .data import held_out, load_split
from .decoding import ATTENTION, GreedyDecoder
from .experts import ExpertFolder, weights_digest
from .measures import divergence, reference_states, to_bits
from .methods import METHODS, Compressed, Inputs, Method, merged_weights, rest_bytes
from .methods.base import linear_names, synchronize
from .serving import LEVELS, prepare_serving, put_weights
from .tasks import TASKS, Item
from .text import encode_items, encode_prompts, item_texts
from .training import STRENGTHS, Strength, compile_layers, compiled_anew, fine_tune

__all__ = ["CALIBRATION", "Budget", "Plan", "Runner"]

#: Calibration sequences in the main comparison.
CALIBRATION = 256


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        experts: in the order in which they are to be done.
        methods: names of methods; the expert comes first whether it is named or not.
        items: held-out items of each expert.
        divergence_items: of these, how many reference answers KL and agreement are measured on.
        calibration: training sequences that methods may calibrate and train on.
        calibration_task: of another task than the expert's, to see what the wrong domain costs; ``"default"`` is the
            package's built-in set.
        distillation_steps: optimiser steps of the methods that train.
        batch_size: prompts decoded at once.
        exact_rest: whether embeddings and norms are the expert's own for every method.
        merged: whether deltas are merged into the base's weights and rounded with them, always or for ``"prompts"``
            alone; else they are served apart.
        numerics: how the kernels round what deltas are multiplied by, ``"int8"`` or ``"int16"``; not, if `None`.
        strengths: name to settings.
        max_new_tokens: cuts the tasks' own limits down.
        train_items: training items, at most.
    """

    experts: Sequence[ExpertId]
    methods: Sequence[str]
    items: int = 2000
    divergence_items: int = 256
    calibration: int = CALIBRATION
    calibration_task: str | None = None
    distillation_steps: int = 200
    batch_size: int = 1024
    exact_rest: bool = True
    merged: bool | Literal["prompts"] = False
    numerics: str | None = None
    strengths: dict[str, Strength] = field(default_factory=lambda: STRENGTHS)
    max_new_tokens: int = 10**6
    train_items: int | None = None

    def label(self, method: str) -> str:
        """A method's name in the results: with what departs from the rules of the main comparison.

        >>> Plan([], [], calibration=8, exact_rest=False).label("ours-2bit")
        'ours-2bit+calibration8+own-rest'
        """
        changes = {
            f"calibration{self.calibration}": self.calibration != CALIBRATION,
            f"calibration-{self.calibration_task}": self.calibration_task is not None,
            "own-rest": not self.exact_rest,
            "merged": self.merged is True,
            "merged-prompts": self.merged == "prompts",
            f"{self.numerics}": self.numerics is not None,
        }
        return "+".join([method, *(change for change, made in changes.items() if made)])

    def settings(self) -> dict[str, Any]:
        """What a cell has to have been made with to count as done."""
        return {
            "items": self.items,
            "divergence_items": self.divergence_items,
            "calibration": self.calibration,
            "calibration_task": self.calibration_task,
            "distillation_steps": self.distillation_steps,
            "exact_rest": self.exact_rest,
            "merged": self.merged,
            **({} if self.numerics is None else {"numerics": self.numerics}),
        }


class Budget:
    """A time limit for steps of unknown length: a step starts if one like it would have ended in time.

    Args:
        seconds: from now; `None` is no limit.
        guess: seconds of a step of a kind that has not been run yet.
    """

    def __init__(self, seconds: float | None, guess: float) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._guess = guess
        self._longest: dict[str, float] = {}

    def allows(self, kind: str) -> bool:
        """Whether a step of this kind still fits, with a tenth to spare."""
        expected = 1.1 * self._longest.get(kind, self._guess)
        return self._end is None or time.monotonic() + expected < self._end

    def spent(self, kind: str, seconds: float) -> None:
        """Note how long a step took."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))


class Runner:
    """One process's share of the benchmark.

    Args:
        base: folder of the base's checkpoint.
        work: where experts and cells are kept.
        data: where the splits are.
        device: where to run.
        compiled: whether to compile the layers for training.
    """

    def __init__(self, base: Path, work: Path, data: Path, device: torch.device, *, compiled: bool = False) -> None:
        self._base, self._work, self._data, self._device = base, work, data, device
        self._compiled = compiled
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._trainee: PreTrainedModel | None = None
        self.cells = CellStore(work / "cells")
        self._model = self._load(torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._model.set_attn_implementation(ATTENTION)
        self._model.eval().requires_grad_(False)
        prepare_serving(self._model)
        # For methods that run it: without the second product that serving adds to every layer.
        self._plain = self._load(self._model.dtype).eval().requires_grad_(False)
        self._plain.set_attn_implementation(ATTENTION)
        self._base_state = {key: value.bfloat16().clone() for key, value in self._model.named_parameters()}
        self._decoder = self._new_decoder()
        self._decoded_task = ""

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self._base, dtype=dtype).to(self._device)

    def _new_decoder(self) -> GreedyDecoder:
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        return GreedyDecoder(self._model, end, graphs=self._device.type == "cuda")

    def folder(self, expert: ExpertId) -> ExpertFolder:
        """Where an expert is kept."""
        return ExpertFolder(self._work / "experts" / str(expert))

    def trainings(self) -> dict[str, Any]:
        """How each expert of the work folder was trained."""
        found = {}
        for path in sorted((self._work / "experts").glob("*/training.json")):
            found[path.parent.name] = ExpertFolder(path.parent).training()
        return found

    @property
    def base_state(self) -> dict[str, Tensor]:
        """The base's parameters by name."""
        return self._base_state

    def run(self, plan: Plan, budget: Budget) -> bool:
        """Do all that is missing; whether nothing is left."""
        for expert in plan.experts:
            if self.folder(expert).training() is None:
                if not budget.allows(f"train {expert.strength}"):
                    return False
                started = time.monotonic()
                training = self.train(expert, plan)
                budget.spent(f"train {expert.strength}", time.monotonic() - started)
                print(f"{expert}: trained in {training['seconds']} s, loss {training['last_loss']}", flush=True)
            missing = [name for name in plan.methods if not self.cells.has(expert, plan.label(name), plan.settings())]
            if missing and not self._measure(expert, plan, missing, budget):
                return False
        return True

    def train(self, expert: ExpertId, plan: Plan) -> dict[str, Any]:
        """Fine-tune an expert and save it; the account of it."""
        items = load_split(self._data, TASKS[expert.task], "train")[: plan.train_items]
        if self._trainee is None:
            self._trainee = self._load(torch.float32)
            if self._compiled:
                compile_layers(self._trainee)
        with torch.no_grad():
            for name, parameter in self._trainee.named_parameters():
                parameter.copy_(self._base_state[name])
        strength = plan.strengths[expert.strength]
        with compiled_anew() if self._compiled else nullcontext():
            training = fine_tune(self._trainee, self._tokenizer, items, strength, seed=expert.seed)
        self._trainee.zero_grad(set_to_none=True)
        training["compiled"] = self._compiled
        weights = {key: value.detach().bfloat16() for key, value in self._trainee.named_parameters()}
        changes = [(weights[key].float() - self._base_state[key].float()).square().mean().sqrt() for key in weights]
        training["digest"] = weights_digest(weights)
        training["largest_rms_change"] = float(f"{float(torch.stack(changes).max()):.3g}")
        self.folder(expert).save(weights, training)
        return training

    def _head(self) -> Tensor:
        head = self._model.get_output_embeddings()
        assert head is not None
        weight: Tensor = head.weight
        return weight

    def _measure(self, expert: ExpertId, plan: Plan, methods: Sequence[str], budget: Budget) -> bool:
        """The missing cells of one expert; whether all were done."""
        if not budget.allows("expert"):
            return False
        started = time.monotonic()
        if self._decoded_task != expert.task:
            # Caches and graphs of another task's shapes are of no more use.
            self._decoder, self._decoded_task = self._new_decoder(), expert.task
        task = TASKS[expert.task]
        items = held_out(load_split(self._data, task, "test"), expert.seed, plan.items)
        references = encode_items(self._tokenizer, items[: plan.divergence_items])
        weights = self.folder(expert).load(self._device)
        put_weights(self._model, weights, {})
        states, head = reference_states(self._model, references), self._head().clone()
        texts, sequences = self._calibration(plan.calibration_task or task.name, plan.calibration)
        calibration_started = time.perf_counter()
        moments = collect_moments(self._model, sequences)
        synchronize()
        calibration_seconds = time.perf_counter() - calibration_started
        inputs = Inputs(
            self._plain,
            self._base_state,
            weights,
            moments,
            sequences,
            expert.seed,
            plan.distillation_steps,
            self._base,
            texts,
        )
        budget.spent("expert", time.monotonic() - started)
        for name in methods:
            if not budget.allows(name):
                return False
            started = time.monotonic()
            method = METHODS[name]
            values = self._compress(method, inputs, plan)
            if method.compress is not None:
                values["calibration_seconds"] = round(calibration_seconds, 2)
            values |= self._score(expert, items, plan)
            compared = divergence(states, head, reference_states(self._model, references), self._head())
            values["divergence"] = {
                "kl": float(f"{compared.kl:.6g}"),
                "top1": round(compared.top1, 6),
                "positions": compared.positions,
            }
            self.cells.write(expert, plan.label(name), plan.settings(), values)
            budget.spent(name, time.monotonic() - started)
            print(
                f"{expert} {plan.label(name)}: {values['right']} of {values['items']}, KL {compared.kl:.4f}, "
                f"{values['linear_bytes']:,} bytes, {time.monotonic() - started:.1f} s",
                flush=True,
            )
        return True

    def _calibration(self, task: str, count: int) -> tuple[list[str], list[tuple[list[int], int]]]:
        """Texts to calibrate on, and their token ids with how many of them are the prompt's."""
        if task == DEFAULT:
            texts = list(read_samples(DEFAULT, self._tokenizer))[:count]
            return texts, [(ids, 0) for ids in self._tokenizer(texts, add_special_tokens=False).input_ids]
        items = load_split(self._data, TASKS[task], "train")[:count]
        return item_texts(items), encode_items(self._tokenizer, items)

    def _compress(self, method: Method, inputs: Inputs, plan: Plan) -> dict[str, Any]:
        """Put the method's weights into the model; bytes, seconds and peak memory of making them."""
        linears = linear_names(self._model)
        base, expert = inputs.base, inputs.expert
        whole = rest_bytes(base, expert, linears)
        elements = sum(base[f"{name}.weight"].numel() for name in linears)
        # The same for all methods, since the decoder's graphs outlive them.
        levels = None if plan.numerics is None else LEVELS[plan.numerics]
        if method.compress is None:
            put_weights(self._model, expert if method.name == "expert" else base, {}, levels=levels)
            full = method.name == "expert"
            return {"linear_bytes": 2 * elements * full, "rest_bytes": whole * full, "linear_weights": elements}
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        started = time.perf_counter()
        known = set(inputs.shared_keys())
        compressed: Compressed = method.compress(inputs)
        synchronize()
        seconds = time.perf_counter() - started
        seconds += sum(inputs.shared_seconds(key) for key in compressed.seconds_of if key in known)
        peak = torch.cuda.max_memory_allocated() - before if cuda else None
        rest = expert if plan.exact_rest else {**expert, **compressed.rest}
        if plan.merged is True:
            put_weights(self._model, merged_weights(base, rest, compressed.deltas), {}, levels=levels)
        else:
            inside = {f"{name}.weight": base[f"{name}.weight"] for name in linears}
            prompts = plan.merged == "prompts"
            put_weights(self._model, {**rest, **inside}, compressed.deltas, merged_prompts=prompts, levels=levels)
        own = compressed.rest_bytes is not None and not plan.exact_rest
        return {
            "linear_bytes": compressed.linear_bytes,
            "rest_bytes": compressed.rest_bytes if own else whole,
            "linear_weights": elements,
            "seconds": round(seconds, 2),
            "peak_bytes": peak,
        }

    def _score(self, expert: ExpertId, items: Sequence[Item], plan: Plan) -> dict[str, Any]:
        """Answer all items and count the right ones."""
        task = TASKS[expert.task]
        started = time.perf_counter()
        prompts = encode_prompts(self._tokenizer, items)
        answers = self._decoder(prompts, min(task.max_new_tokens, plan.max_new_tokens), plan.batch_size)
        seconds = time.perf_counter() - started
        texts = [text.strip() for text in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]
        right = [task.score(text, item) for text, item in zip(texts, items, strict=True)]
        return {
            "items": len(items),
            "right": sum(right),
            "correct": to_bits(right),
            "generation_seconds": round(seconds, 2),
            "examples": texts[:2],
        }


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The settings of a plan, and of the trainings that it asks for."""
    used = {expert.strength for expert in plan.experts}
    return {**plan.settings(), "strengths": {name: asdict(plan.strengths[name]) for name in sorted(used)}}
