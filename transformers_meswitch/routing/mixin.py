"""``model.route`` and the router of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedOperationError
from ..peft_method.switch import ExpertSwitch
from .conversation import is_chat, template_marks, turns_in_ids
from .loading import Router
from .output import RouterOutput
from .texts import Prompt, routed_turns
from .window import control_ids, token_window, window_ids

__all__ = ["RoutingMixin"]

logger = logging.getLogger(__name__)

#: How many of the user's messages are looked at, from the last, for one that says what a conversation is about.
_TURNS = 8
_NO_ROUTER = (
    "expert='auto' needs a router, and this model has none. Train one with HeadRouter.train(model, prompts) and give "
    "it to model.set_router(), or name the expert: {}."
)


class RoutingMixin:
    """The router of a model with experts."""

    _meswitch_switch: ExpertSwitch
    _meswitch_router: Router | None = None

    @property
    def router(self) -> Router | None:
        """What picks the expert with ``expert="auto"``; see :meth:`set_router`."""
        return self._meswitch_router

    def set_router(self, router: Router | None) -> None:
        """Let a router pick the expert with ``expert="auto"``, or none any more; saved and pushed with the family.

        Raises:
            RouterError: it was fitted to another base.
        """
        if router is not None:
            router.check(self)
        self._meswitch_router = router

    def route(
        self, prompts: Prompt | Iterable[Prompt] | torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> RouterOutput:
        """Let the router read prompts and pick an expert for each.

        Of a conversation the last message of the user decides, without the system prompt. A message that does not say
        what it is about ("shorter, please") leaves the choice to the one before, so that a conversation keeps its
        expert until the user clearly turns to something else; 8 messages are looked at.

        Of each text no more than the router's window is read by the model, whatever its length. No text raises an
        error: an empty one is an abstention.

        Args:
            prompts: a text, a conversation (a list of messages), or a list of either; or int64 ``[rows, length]``
                token ids by the base's tokenizer. In these, the user's messages are told apart by the marks of the
                base's chat template; without any, the whole row is the prompt.
            attention_mask: ``[rows, length]``, 0 at padding on either side of token ids; without it, special tokens
                are left out.

        Raises:
            RouterError: the router knows none of the loaded experts.
            TypeError: a prompt that is neither a text nor a conversation; a mapping, such as a tokenizer returns, of
                which ``input_ids`` and ``attention_mask`` are to be given.
            UnsupportedOperationError: there is no router; an expert is merged into the base, which the router reads.
        """
        router = self._meswitch_router
        if router is None:
            loaded = ", ".join(map(repr, self._meswitch_switch.experts))
            raise UnsupportedOperationError(_NO_ROUTER.format(loaded or "none is loaded"))
        tokenizer: Any = self.tokenizer_for(None)  # type: ignore[attr-defined]
        if isinstance(prompts, torch.Tensor):
            vocab_size = self._meswitch_switch.base_vocab_size
            conversations = _rows_of_ids(tokenizer, prompts, attention_mask, router.window, vocab_size)
        else:
            # A mapping, such as what a tokenizer returns, would be taken for a list of its keys.
            several = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping)
            asked: Iterable[Any] = prompts if several and not is_chat(prompts) else [prompts]
            turns = [routed_turns(prompt)[-_TURNS:] for prompt in asked]
            conversations = _windows(tokenizer, turns, router.window)
        output = self._route_turns(router, conversations)
        if logger.isEnabledFor(logging.INFO):
            _log(output)
        return output

    def _route_turns(self, router: Router, conversations: Sequence[Sequence[list[int]]]) -> RouterOutput:
        """Route the last turn of each conversation; where that is an abstention, the one before, and so on."""
        experts = list(self._meswitch_switch.experts)
        last = [turns[-1] if turns else [] for turns in conversations]
        output = router.route_ids(self, last, experts)
        for back in range(2, _TURNS + 1):
            open_rows = [
                i for i, turns in enumerate(conversations) if bool(output.abstained[i]) and len(turns) >= back
            ]
            if not open_rows:
                break
            earlier = router.route_ids(self, [conversations[i][-back] for i in open_rows], experts)
            for place, i in enumerate(open_rows):
                if not bool(earlier.abstained[place]):
                    output.experts[i] = earlier.experts[place]
                    output.probabilities[i] = earlier.probabilities[place]
                    output.abstained[i] = False
        return output


def _log(output: RouterOutput) -> None:
    rows = zip(output.experts, output.abstained.tolist(), output.confidence, strict=True)
    for row, (expert, abstained, confidence) in enumerate(rows):
        logger.info(
            "Row %d goes to %s: %s %.3f",
            row,
            "the base" if expert is None else f"expert {expert!r}",
            "the router abstained, likeliest" if abstained else "probability",
            confidence,
        )


def _windows(tokenizer: Any, conversations: Sequence[Sequence[str]], window: int) -> list[list[list[int]]]:
    """Token windows of each turn of each conversation, tokenised in one call."""
    rows = iter(window_ids(tokenizer, [turn for turns in conversations for turn in turns], window))
    return [[next(rows) for _ in turns] for turns in conversations]


def _rows_of_ids(
    tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor | None, window: int, vocab_size: int
) -> list[list[list[int]]]:
    """Token windows of each turn of rows of token ids; ids that the base does not know are passed over."""
    if ids.is_floating_point() or ids.dim() != 2:
        raise UnsupportedOperationError(
            f"A router reads int64 token ids [rows, length], not {ids.dtype} {tuple(ids.shape)}. Give input_ids, or "
            "route the texts and name the experts that come out."
        )
    marks, control = template_marks(tokenizer), control_ids(tokenizer)
    keep = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.to(ids.device)
    found = []
    for row, real in zip(ids.tolist(), (keep != 0).tolist(), strict=True):
        known = [token for token, is_real in zip(row, real, strict=True) if is_real and 0 <= token < vocab_size]
        turns = [] if marks is None else turns_in_ids(tokenizer, known, marks)[-_TURNS:]
        bare = token_window([token for token in known if token not in control], window)
        found.append(window_ids(tokenizer, turns, window) if turns else [bare])
    return found
