"""Continuous batching with an expert: each manager serves all of its requests with one.

transformers runs a manager's model calls in a thread of its own, which sees no choice made for a call, and shares the
cached prefix of equal prompts between requests. A manager is therefore bound to one expert for its life.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.utils import logging

from .errors import UnsupportedOperationError
from .generation import STICKY, ExpertGenerationMixin, Experts, check_vocabulary, named, one_expert
from .peft_method.switch import ExpertInfo, ExpertSwitch

__all__ = ["ContinuousExpertMixin", "ExpertBatchingManager"]


logger = logging.get_logger(__name__)


def _call_as_written(config: Any) -> None:
    """Let a manager call the model without CUDA graphs and compiled code.

    Those read which expert is chosen when they run, and that may be another one by then than the manager's.

    Args:
        config: the manager's own copy of what it was asked for, with every default filled in.
    """
    compiled = [name for name in ("varlen_compile_config", "decode_compile_config") if getattr(config, name, None)]
    if any(config.cuda_graph_booleans) or compiled:
        logger.warning_once(
            "A batching manager calls a model with experts without CUDA graphs and compiled code, which would follow "
            "later choices of experts. Merge an expert (merge_and_unload) to serve it with them."
        )
    config.use_cuda_graph = (False, False)
    config.use_async_batching = False
    for name in compiled:
        setattr(config, name, None)


class ExpertBatchingManager(ContinuousBatchingManager):
    """transformers' manager, with the expert that was chosen when it was made; later choices do not change it."""

    expert: str | None
    _info: ExpertInfo | None
    _context: contextvars.Context

    @classmethod
    def bind(
        cls, manager: ContinuousBatchingManager, switch: ExpertSwitch, expert: str | None
    ) -> ContinuousBatchingManager:
        """Make a manager that serves nothing yet serve an expert (`None` is the base)."""
        manager.__class__ = cls
        if switch.live:
            _call_as_written(manager.continuous_batching_config)
        manager.expert = expert
        manager._info = None if expert is None else switch.experts[expert]
        return manager

    def serves(self, expert: str | None) -> bool:
        """Whether this is a manager of that very expert, not of one that had its name before."""
        switch: ExpertSwitch = self.model._meswitch_switch
        return self.expert == expert and (expert is None or self._info is switch.experts.get(expert))

    def warmup(self) -> None:
        """As in transformers."""
        with self._chosen():
            super().warmup()

    def start(self) -> None:
        """As in transformers.

        Raises:
            ExpertNotFoundError: the expert was deleted.
            UnsupportedOperationError: adapters are disabled, or another expert is merged.
        """
        with self._chosen():
            self._context = contextvars.copy_context()
            super().start()

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        # A new thread has an empty context before Python 3.14.
        self._context.run(super()._run_generation_loop, *args, **kwargs)

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        with self.model._meswitch_switch.rows([self.expert]):
            yield


class ContinuousExpertMixin(ExpertGenerationMixin):
    """``generate_batch`` and its manager, for one expert at a time."""

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> ContinuousBatchingManager:
        """A manager as of transformers, all of whose requests one expert answers until it is destroyed.

        The expert is that of ``generation_config.expert`` (the one given, then the model's), else the active one.
        Answers end at its own EOS, unless the config given has another.

        Raises:
            ExpertNotFoundError: the expert is not loaded.
            UnsupportedOperationError: a persistent manager of another expert is kept.
        """
        switch = self._meswitch_switch
        rows = switch.chosen_rows()  # in generate_batch, which has completed the config as well
        if rows is None:
            rows = self._row_experts(STICKY, generation_config, 1)
            generation_config = self._ending_config(rows[0], generation_config)
        expert = one_expert(rows)
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(kept, ContinuousBatchingManager):
            if not isinstance(kept, ExpertBatchingManager) or not kept.serves(expert):
                raise UnsupportedOperationError(
                    f"The persistent manager that is kept was made for {named(getattr(kept, 'expert', None))} and its "
                    f"cache is of no use to {named(expert)}. Call destroy_cached_continuous_batching_manager() first."
                )
            return super().init_continuous_batching(generation_config, *args, **kwargs)  # type: ignore[misc]
        manager = super().init_continuous_batching(generation_config, *args, **kwargs)  # type: ignore[misc]
        return ExpertBatchingManager.bind(manager, switch, expert)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *args: Any,
        expert: Experts = STICKY,
        **kwargs: Any,
    ) -> Any:
        """Generate by continuous batching as transformers does, all prompts answered by one expert.

        Args:
            inputs: token ids of the prompts.
            generation_config: as in transformers; an attribute ``expert`` is honoured.
            *args: further positional arguments of transformers' ``generate_batch``.
            expert: the expert's name; `None`, ``"base"`` or ``"__base__"`` is the base. A list must name one only.
            **kwargs: further arguments of transformers' ``generate_batch``.

        Raises:
            ExpertNotFoundError: the expert is not loaded.
            UnsupportedOperationError: different experts, ``adapter_names``, a persistent manager of another expert is
                kept, or as for ``generate``.
            VocabularyError: a prompt holds an id that the expert does not know.
        """
        if "adapter_names" in kwargs:
            raise UnsupportedOperationError("generate_batch takes no adapter_names; name one expert with expert=.")
        if not inputs:
            return {}
        switch = self._meswitch_switch
        completed = expert is STICKY and switch.has_rows  # by generate(cache_implementation="paged")
        rows = self._row_experts(expert, generation_config, len(inputs))
        chosen = one_expert(rows)
        for row, ids in enumerate(inputs):
            check_vocabulary(switch, [chosen], torch.tensor([list(ids)]), None, first_row=row)
        if not completed:
            generation_config = self._ending_config(chosen, generation_config)
        with switch.rows([chosen]):
            return super().generate_batch(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _ending_config(self, expert: str | None, generation_config: GenerationConfig | None) -> GenerationConfig:
        """The config of a call with the EOS of its expert, unless the caller stated one."""
        stated = self._stated_eos(generation_config)
        config = copy.deepcopy(generation_config or self.generation_config)
        own = self._meswitch_switch.eos_token_id(expert)
        if stated is None and own:
            config.eos_token_id = list(own)
        return config
