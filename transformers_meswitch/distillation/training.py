"""The training itself: Adam on the factors of step sizes until the logits are the expert's.

BitDelta (arXiv 2402.10193, section 3.1) trains the scalar of each matrix so, by the mean square difference of the
logits; ME-Switch (arXiv 2406.09041, section 3.2) its step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DistillationError
from .split_model import OutputHead, check_split, checkpoint_layers, hidden_states
from .weights import TrainedDelta

__all__ = ["Distillation", "DistillationBatch", "Loss"]

#: ``"kl"``: KL(expert ‖ student) in nats; ``"mse"``: mean square difference of the logits. Both a token.
Loss = Literal["kl", "mse"]

#: Logits that are in memory at once: bounds some six float32 copies of them, whatever the vocabulary.
_LOGITS = 2**25
_BETAS = (0.9, 0.99)
#: Far below torch's: of a row's step in a large model, gradients of 1e-8 are what there is.
_EPSILON = 1e-15


@dataclass(frozen=True)
class DistillationBatch:
    """Sequences of equal length with what the expert makes of them.

    Attributes:
        ids: int64 ``[rows, length]``, padded on the right.
        positions: bool ``[rows, length]``, where logits are compared; not on padding.
        hidden: ``[n, width]``, the expert's last hidden states there, row after row.
    """

    ids: Tensor
    positions: Tensor
    hidden: Tensor


class Distillation:
    """A student, its trained deltas and their optimiser.

    Adam with a rate that falls to zero along a cosine. Nothing is drawn here, so equal batches give equal steps.

    Args:
        model: the student, a causal LM in evaluation mode that adds ``deltas`` to its linears (see
            :func:`~.weights.add_to_linears`); all its other parameters are frozen.
        deltas: linear's name to its delta.
        expert_head: the expert's :class:`~.split_model.OutputHead`: hidden states ``[n, width]`` to logits
            ``[n, vocabulary]``.
        steps: how many steps there will be.
        learning_rate: of the first step.
        loss: what is minimised.
        checkpointing: whether to keep of a decoder layer's activations only its input; costs a third more time.

    Raises:
        UnsupportedModelError: on the first batch, a model whose logits are no function of its last hidden states.
    """

    def __init__(
        self,
        model: Any,
        deltas: Mapping[str, TrainedDelta],
        expert_head: Callable[[Tensor], Tensor],
        *,
        steps: int,
        learning_rate: float = 1e-2,
        loss: Loss = "kl",
        checkpointing: bool = True,
    ) -> None:
        self._model, self._expert_head, self._head = model, expert_head, OutputHead(model)
        self._steps, self._rate, self._loss = steps, learning_rate, loss
        self._trained: dict[str, nn.Parameter] = {
            f"{name}.{key}": parameter
            for name, delta in deltas.items()
            for key, parameter in delta.named_parameters(recurse=False)
        }
        ours = set(map(id, self._trained.values()))
        for parameter in model.parameters():
            if id(parameter) not in ours:
                parameter.requires_grad_(False)
        if checkpointing:
            checkpoint_layers(model)
        self._adam = torch.optim.Adam(self._trained.values(), lr=learning_rate, betas=_BETAS, eps=_EPSILON)
        self._checked = False
        #: Steps done.
        self.done = 0

    def step(self, batches: Sequence[DistillationBatch]) -> float:
        """One step of the optimiser, whose gradient is that of the mean over all positions of the batches.

        Returns:
            That mean, before the step.

        Raises:
            DistillationError: it is not a finite number; nothing was changed.
        """
        total = sum(len(batch.hidden) for batch in batches)
        mean = torch.stack([self._gradients(batch, total) for batch in batches]).sum().item()
        if not math.isfinite(mean):
            self._adam.zero_grad(set_to_none=True)
            raise DistillationError(
                f"The loss of step {self.done + 1} of {self._steps} is {mean}, expected a finite number. Try a lower "
                f"learning rate than {self._rate:g}; if the first step gives the same, base, expert or delta overflow "
                "on this text."
            )
        for group in self._adam.param_groups:
            group["lr"] = self._rate * (1 + math.cos(math.pi * self.done / self._steps)) / 2
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.done += 1
        return mean

    @torch.no_grad()
    def evaluate(self, batches: Iterable[DistillationBatch], loss: Loss | None = None) -> float:
        """The mean loss a position, of the deltas as they would be stored by now.

        Args:
            batches: at least one position in all.
            loss: another one than what is minimised.
        """
        total, positions = 0.0, 0
        for batch in batches:
            hidden = self._hidden(batch)
            for part, of_expert in self._parts(hidden, batch):
                total += float(self._distance(part, of_expert, loss or self._loss).double().sum())
            positions += len(batch.hidden)
        return total / positions

    def state(self) -> dict[str, Tensor]:
        """All that further steps depend on but :attr:`done`: trained parameters and Adam's moments, float32."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            tensors[name] = parameter.detach()
            moments = self._adam.state.get(parameter, {})
            tensors |= {f"{name}:{key}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Go on from what :meth:`state` gave after ``done`` steps.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, parameter in self._trained.items():
            with torch.no_grad():
                parameter.copy_(tensors[name])
            if done:
                moments = {key: tensors[f"{name}:{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        self.done = done

    def _gradients(self, batch: DistillationBatch, total: int) -> Tensor:
        """Add a batch's gradients; its part of the mean over ``total`` positions is returned."""
        hidden = self._hidden(batch)
        # The logits' graph ends here, so that one part of them is in memory at a time.
        cut = hidden.detach().requires_grad_()
        mean = torch.zeros((), device=hidden.device)
        for part, of_expert in self._parts(cut, batch):
            loss = self._distance(part, of_expert, self._loss).sum() / total
            loss.backward()
            mean += loss.detach()
        hidden.backward(cut.grad)
        return mean

    def _hidden(self, batch: DistillationBatch) -> Tensor:
        if not self._checked:
            check_split(self._model, batch.ids[:1])
            self._checked = True
        return hidden_states(self._model, batch.ids, batch.positions)

    def _parts(self, hidden: Tensor, batch: DistillationBatch) -> Iterable[tuple[Tensor, Tensor]]:
        """Logits of the student and of the expert, a part at a time."""
        rows = max(1, _LOGITS // int(self._model.config.get_text_config().vocab_size))
        for mine, theirs in zip(hidden.split(rows), batch.hidden.split(rows), strict=True):
            with torch.no_grad():
                of_expert = self._expert_head(theirs.to(hidden.device, hidden.dtype))
            # Ids that the expert does not have are no answers of it.
            yield self._head(mine)[:, : of_expert.shape[-1]], of_expert

    @staticmethod
    def _distance(student: Tensor, expert: Tensor, loss: Loss) -> Tensor:
        """Logits ``[n, vocabulary]`` of both to the loss of each position, float32 ``[n]``."""
        student, expert = student.float(), expert.float()
        if loss == "mse":
            return (student - expert).square().mean(dim=-1)
        log_student, log_expert = F.log_softmax(student, dim=-1), F.log_softmax(expert, dim=-1)
        return F.kl_div(log_student, log_expert, log_target=True, reduction="none").sum(dim=-1)
