"""``generate(..., expert=)``: which expert answers each row, and where each row ends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput

from .errors import UnsupportedOperationError, VocabularyError
from .peft_method.naming import known_expert
from .peft_method.switch import ExpertSwitch
from .routing.output import RouterOutput

__all__ = [
    "AUTO",
    "STICKY",
    "ExpertGenerationMixin",
    "Experts",
    "RowEosCriteria",
    "RowMinLengthProcessor",
    "RowVocabularyProcessor",
    "check_vocabulary",
    "named",
    "one_expert",
]

#: Tells "no expert argument" from ``expert=None``, which means the base.
STICKY: Any = object()
Experts = str | None | Iterable[str | None]
#: In the place of an expert's name: the router picks it.
AUTO = "auto"


class ExpertGenerationMixin:
    """``generate`` with an expert per call or per row."""

    _meswitch_switch: ExpertSwitch
    route: Callable[..., RouterOutput]
    generation_config: GenerationConfig

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        expert: Experts = STICKY,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, each row answered by its expert and ending at that expert's own EOS.

        Precedence: ``expert=`` of the call, ``generation_config.expert`` (the call's, then the model's), the expert
        chosen with ``set_expert`` or ``set_adapter``.

        Args:
            inputs: int64 ``[rows, length]`` prompts, as in transformers.
            generation_config: as in transformers; an attribute ``expert`` is honoured.
            *args: further positional arguments of transformers' ``generate``.
            expert: a name for all rows, or one per row; `None`, ``"base"`` or ``"__base__"`` is the base, and with
                ``"auto"`` the router picks the row's expert (:meth:`route`), which reads ``input_ids`` as the base's
                tokenizer and chat template wrote them.
            **kwargs: further arguments of transformers' ``generate``, and ``adapter_names``, PEFT's ``expert``.
                An ``eos_token_id`` given here, or in a ``generation_config`` that is no copy of the model's, holds for
                all rows; otherwise each row ends at its expert's own. Ids that ``attention_mask`` masks need not be
                known.

        Returns:
            As transformers. With ``return_dict_in_generate=True`` and ``"auto"``, the output also has
            ``router_output``, a :class:`~.routing.output.RouterOutput` of all rows; probabilities of rows whose expert
            was named are NaN.

        Raises:
            ExpertNotFoundError: an expert is not loaded.
            RouterError: the router knows none of the loaded experts.
            UnsupportedOperationError: an expert while adapters are disabled, ``"auto"`` without a router or without
                ``input_ids``, experts named twice, different experts with ``cache_implementation="paged"``, an
                assistant of another vocabulary.
            ValueError: another number of experts than rows, or no rows.
            VocabularyError: a prompt or the padding is an id that its row's expert does not know.
        """
        kwargs.update(zip(("logits_processor", "stopping_criteria", *_POSITIONAL), args, strict=False))
        names = kwargs.pop("adapter_names", None)
        if names is not None and expert is not STICKY:
            raise UnsupportedOperationError("generate() got expert= and adapter_names=, which is PEFT's name for it.")
        expert = expert if names is None else names
        switch = self._meswitch_switch
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        batch = 1 if prompt is None else prompt.shape[0]
        if batch == 0:
            raise ValueError("The prompt has no rows; there is nothing to generate.")
        padding, mask = None, kwargs.get("attention_mask")
        routed: list[RouterOutput] = []

        def pick(names: list[Any]) -> list[Any]:
            if prompt is None or prompt.is_floating_point():
                raise UnsupportedOperationError(
                    "expert='auto' reads token ids, and this call has none. Give input_ids, or name the expert."
                )
            routed.append(self._routed_rows(names, prompt, mask))
            return routed[0].experts

        rows = self._row_experts(expert, generation_config, batch, pick)
        if kwargs.get("cache_implementation") == "paged":
            # transformers hands the prompts, padding and all, to generate_batch.
            one_expert(rows)
            mask = None
        if prompt is not None and not prompt.is_floating_point():
            padding = check_vocabulary(switch, rows, prompt, mask)
        if padding is not None:
            readable = prompt.masked_fill(padding, 0)  # type: ignore[union-attr]
            inputs, kwargs = (inputs, {**kwargs, "input_ids": readable}) if inputs is None else (readable, kwargs)
        assistant = kwargs.get("assistant_model")
        if assistant is not None and kwargs.get("assistant_tokenizer") is None and batch == 1:
            _check_assistant(switch, rows[0], assistant)
        changed = self._row_endings(rows, prompt, generation_config, kwargs)
        pad = changed.get("pad_token_id")
        if generation_config is not None:
            # transformers warns of generation parameters beside a config.
            generation_config = copy.deepcopy(generation_config)
            for key in {"eos_token_id", "pad_token_id"} & changed.keys() - kwargs.keys():
                setattr(generation_config, key, changed.pop(key))
        kwargs.update(changed)
        limits = [switch.vocab_size(row) for row in rows]
        if min(limits) < switch.vocab_capacity:
            processors = [*(kwargs.get("logits_processor") or []), RowVocabularyProcessor(limits)]
            kwargs["logits_processor"] = LogitsProcessorList(processors)
        with switch.rows(rows):
            output = super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        if padding is not None:
            _put_back(output, prompt, padding)  # type: ignore[arg-type]
        if routed and isinstance(output, ModelOutput):
            output["router_output"] = routed[0]
        return _padded(output, switch.vocab_capacity, pad)

    def _row_experts(
        self,
        expert: Experts,
        generation_config: GenerationConfig | None,
        batch: int,
        pick: Callable[[list[Any]], list[Any]] | None = None,
    ) -> list[str | None]:
        """The expert of each row; ``pick`` puts names where the caller left the choice to the router."""
        switch = self._meswitch_switch
        if expert is STICKY:
            chosen = switch.chosen_rows(batch)  # by PeftModel.generate(adapter_names=)
            if chosen is not None:
                return chosen
            configs = [vars(c) for c in (generation_config, self.generation_config) if hasattr(c, "expert")]
            # A default is no wish for an expert while adapters are disabled.
            expert = configs[0]["expert"] if configs and not switch.disabled else switch.active_expert
        if not (expert is None or isinstance(expert, str | Iterable)):
            known_expert(expert, switch.experts)  # which refuses it
        named_each = not isinstance(expert, str) and isinstance(expert, Iterable)
        asked = list(expert) if named_each else [expert]  # type: ignore[arg-type]
        rows: list[Any] = [name if name == AUTO else known_expert(name, switch.experts) for name in asked]
        if not named_each:
            rows *= batch
        if len(rows) != batch:
            raise ValueError(f"{len(rows)} experts were named for {batch} rows; name one per row, or one for all.")
        if AUTO not in rows:
            return rows
        if pick is None:
            raise UnsupportedOperationError(
                "expert='auto' is not supported in continuous batching, which serves one expert at a time. Sort the "
                "prompts with model.route(texts), and call it once for each expert."
            )
        if switch.disabled:
            raise UnsupportedOperationError(
                "expert='auto' was asked for while adapters are disabled. Call enable_adapters() or set_expert() "
                "first."
            )
        return pick(rows)

    def _routed_rows(self, names: list[Any], prompt: torch.Tensor, mask: Any) -> RouterOutput:
        """The router's choice for rows named ``"auto"``, and the caller's for the others, of NaN probability."""
        asked = [i for i, name in enumerate(names) if name == AUTO]
        whole = isinstance(mask, torch.Tensor) and mask.shape == prompt.shape
        found = self.route(prompt[asked], mask[asked] if whole else None)
        if len(asked) == len(names):
            return found
        experts, probabilities = list(names), torch.full((len(names), len(found.labels)), float("nan"))
        abstained = torch.zeros(len(names), dtype=torch.bool)
        for place, i in enumerate(asked):
            experts[i] = found.experts[place]
        probabilities[asked], abstained[asked] = found.probabilities, found.abstained
        return RouterOutput(experts, probabilities, found.labels, abstained)

    def _row_endings(
        self,
        rows: Sequence[str | None],
        prompt: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments that make each row end at its expert's own EOS."""
        switch = self._meswitch_switch
        config = generation_config or self.generation_config
        explicit = _ids(kwargs.get("eos_token_id")) or self._stated_eos(generation_config)
        endings = [explicit or switch.eos_token_id(row) for row in rows]
        pad = self._pad_token(rows, endings, config, kwargs)
        padding = {} if pad is None else {"pad_token_id": pad}
        if explicit:
            return padding
        if len(set(endings)) == 1:
            return {"eos_token_id": list(endings[0]), **padding} if endings[0] else padding
        if kwargs.get("exponential_decay_length_penalty", config.exponential_decay_length_penalty) is not None:
            raise UnsupportedOperationError(
                "exponential_decay_length_penalty raises the score of one EOS, but the rows of this batch end at "
                "different ones. Generate for one expert at a time."
            )
        # No token has these ids, so transformers' own criterion and processors never see a row end; beam search keeps
        # as many spare candidates as there are of them.
        never = [switch.vocab_capacity + i for i in range(max(map(len, endings)))]
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        processors = LogitsProcessorList(kwargs.get("logits_processor") or [])
        minimum = _minimum_length(prompt, config, kwargs)
        if minimum > 0:
            processors.append(RowMinLengthProcessor(endings, minimum))
        criteria.append(RowEosCriteria(endings))
        changed: dict[str, Any] = {"eos_token_id": never, "stopping_criteria": criteria, **padding}
        pad_ends_a_row = any(pad in ids for ids in endings)
        if pad_ends_a_row and prompt is not None and not prompt.is_floating_point() and "attention_mask" not in kwargs:
            # transformers takes pads in a prompt for padding unless the pad is an EOS, which chats are full of.
            changed["attention_mask"] = torch.ones_like(prompt)
        return {**changed, "logits_processor": processors} if processors else changed

    def _stated_eos(self, generation_config: GenerationConfig | None) -> tuple[int, ...] | None:
        """The EOS of a call's config (or the model's) where it is the caller's choice, not a default copied around."""
        switch = self._meswitch_switch
        defaults = [None, switch.base_eos_token_id, *(info.eos_token_id for info in switch.experts.values())]
        own = _ids((generation_config or self.generation_config).eos_token_id)
        return own if own not in defaults or self._is_callers_own(generation_config) else None

    def _is_callers_own(self, config: GenerationConfig | None) -> bool:
        """Whether a config was made for the call; copies of the model's, as pipelines pass, have its other tokens."""
        ours = self.generation_config
        token = next((key for key in ("bos_token_id", "pad_token_id") if getattr(ours, key) is not None), None)
        return config is not None and token is not None and getattr(config, token) != getattr(ours, token)

    def _pad_token(
        self,
        rows: Sequence[str | None],
        endings: Sequence[Sequence[int]],
        config: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> int | None:
        """What finished rows are filled with: an id that all rows can read, as they are read till the last ends."""
        switch, default = self._meswitch_switch, self.generation_config.pad_token_id
        own = [switch.experts[row].pad_token_id for row in rows if row is not None]
        stated = kwargs.get("pad_token_id", config.pad_token_id if config.pad_token_id != default else None)
        reader = min(rows, key=switch.vocab_size)
        limit = switch.vocab_size(reader)
        if stated is not None and stated >= limit and len(rows) > 1:
            raise VocabularyError(
                f"pad_token_id is {stated}, but {named(reader)} knows ids below {limit} and would read it once its "
                "row has ended. Give a padding id that all rows know, or none."
            )
        usual = [default, *own] if len(set(rows)) > 1 else [*own, default]
        pads = [stated, *usual, *(i for ids in endings for i in ids)]
        return next((p for p in pads if p is not None and p < limit), None if len(set(endings)) == 1 else 0)


def _minimum_length(prompt: torch.Tensor | None, config: GenerationConfig, kwargs: dict[str, Any]) -> int:
    """Tokens a row must have before it may end, counted as in transformers: prompts given as embeddings have none."""
    length = 0 if prompt is None else prompt.shape[1]
    shortest = kwargs.get("min_length", config.min_length) or 0
    added = kwargs.get("min_new_tokens", config.min_new_tokens)
    if prompt is not None and prompt.is_floating_point():
        shortest, length = shortest - length, 0
    return max(shortest, 0 if added is None else length + added)


def _positional_names() -> tuple[str, ...]:
    from transformers import GenerationMixin

    names = list(inspect.signature(GenerationMixin.generate).parameters)
    return tuple(names[names.index("stopping_criteria") + 1 :])


_POSITIONAL = _positional_names()


def _padded(output: Any, capacity: int, pad: int | None) -> Any:
    """Beam search fills short answers with the EOS where the pad id is 0; no token has ours, so put the pad back."""
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    if sequences is not None and pad is not None:
        sequences.masked_fill_(sequences >= capacity, pad)
    return output


def _ids(eos: Any) -> tuple[int, ...] | None:
    if eos is None:
        return None
    if isinstance(eos, torch.Tensor):
        eos = eos.tolist()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def check_vocabulary(
    switch: ExpertSwitch, rows: Sequence[str | None], prompt: torch.Tensor, mask: Any, first_row: int = 0
) -> torch.Tensor | None:
    """Refuse ids ``[rows, length]`` that a row's expert does not know; where they are only padding, return where.

    Args:
        switch: the model's.
        rows: the expert of each row.
        prompt: int64 ``[rows, length]``.
        mask: ``[rows, length]``, 0 at padding, if there is one.
        first_row: number of the first row in what the caller gave.

    Raises:
        VocabularyError: names the row and the id.
    """
    limits = torch.tensor([switch.vocab_size(row) for row in rows], device=prompt.device)
    unknown = prompt >= limits.unsqueeze(1)
    if not bool(unknown.any()):
        return None
    read = unknown
    if isinstance(mask, torch.Tensor) and mask.shape == prompt.shape:
        read = unknown & (mask.to(prompt.device) != 0)
    if bool(read.any()):
        row, column = (int(i) for i in read.nonzero()[0])
        expert = rows[row]
        raise VocabularyError(
            f"Row {first_row + row} holds token id {int(prompt[row, column])}, but "
            f"{named(expert)} knows ids below {int(limits[row])}. Tokenise "
            f"the row with model.tokenizer_for({expert!r})."
        )
    return unknown


def _check_assistant(switch: ExpertSwitch, row: str | None, assistant: Any) -> None:
    """Refuse an assistant without tokenizers to translate between, unless it has the row's ids and logits."""
    own = vars(assistant).get("_meswitch_switch")
    if own is switch:
        return
    width = assistant.config.get_text_config().vocab_size
    known = width if own is None else own.vocab_size(own.active_expert)
    if not switch.vocab_size(row) == known == width == switch.vocab_capacity:
        raise UnsupportedOperationError(
            f"The assistant knows {known} ids and its logits are {width} wide; {named(row)} knows "
            f"{switch.vocab_size(row)} and the logits of this model are {switch.vocab_capacity} wide, which must be "
            "the same. Give tokenizer= and assistant_tokenizer= as well, or use prompt_lookup_num_tokens= instead."
        )


def _put_back(output: Any, prompt: torch.Tensor, padding: torch.Tensor) -> None:
    """Give the answers' prompts the padding that the caller gave, in place of what the model was given to read."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    start = sequences[:, : prompt.shape[1]]
    start.copy_(torch.where(_spread(padding, start), _spread(prompt, start), start))


def one_expert(rows: Sequence[str | None]) -> str | None:
    """The expert that all rows share.

    Raises:
        UnsupportedOperationError: they name several; continuous batching serves one at a time.
    """
    distinct = list(dict.fromkeys(rows))
    if len(distinct) > 1:
        raise UnsupportedOperationError(
            f"Continuous batching serves one expert at a time, not {' and '.join(map(named, distinct))} together. "
            "Call it once for each, or generate(..., expert=[...]) without cache_implementation='paged'."
        )
    return distinct[0]


def named(expert: str | None) -> str:
    """An expert in a sentence: ``expert 'math'`` or ``the base``."""
    return "the base" if expert is None else f"expert {expert!r}"


class RowEosCriteria(StoppingCriteria):
    """Ends each row at its own EOS; rows repeated for beams or return sequences end as the row they come from.

    Args:
        endings: for each prompt, the ids that end its answer.
    """

    def __init__(self, endings: Sequence[Sequence[int]]) -> None:
        most = max(len(ids) for ids in endings)
        # transformers pads finished rows only if some criterion has this attribute.
        self.eos_token_id = torch.tensor([[*ids, *[-1] * (most - len(ids))] for ids in endings])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Int64 ``[rows, length]`` to bool ``[rows]``: whether the last token ends the row."""
        endings = _spread(self.eos_token_id, input_ids)
        return (input_ids[:, -1:] == endings).any(dim=1)


class RowMinLengthProcessor(LogitsProcessor):
    """Forbids each row its own EOS until the sequence is ``minimum`` tokens long.

    Args:
        endings: for each prompt, the ids that end its answer.
        minimum: length in tokens, prompt included.
    """

    def __init__(self, endings: Sequence[Sequence[int]], minimum: int) -> None:
        self.endings = endings
        self.minimum = minimum

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[rows, vocab]`` with each row's own EOS at ``-inf`` while it is too short."""
        if input_ids.shape[1] >= self.minimum:
            return scores
        forbidden = torch.zeros(len(self.endings), scores.shape[1], dtype=torch.bool)
        for row, ids in enumerate(self.endings):
            forbidden[row, [i for i in ids if i < scores.shape[1]]] = True
        return scores.masked_fill(_spread(forbidden, input_ids), float("-inf"))


class RowVocabularyProcessor(LogitsProcessor):
    """Keeps each row inside its expert's vocabulary.

    The output head does so already, but processors that combine scores (classifier-free guidance) turn the ``-inf`` of
    unknown ids into NaN.

    Args:
        limits: for each prompt, the number of ids that its expert knows.
    """

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits = torch.tensor(limits).unsqueeze(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[rows, vocab]`` with ids that a row does not know at ``-inf``."""
        unknown = torch.arange(scores.shape[1], device=scores.device) >= _spread(self.limits, scores)
        return scores.masked_fill(unknown, float("-inf"))


def _spread(per_prompt: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    copies = rows.shape[0] // per_prompt.shape[0]
    return per_prompt.to(rows.device).repeat_interleave(copies, dim=0)
