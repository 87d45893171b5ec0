"""``pipeline("text-generation")`` with experts: each call uses the tokenizer and chat template of its expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import PeftModel
from transformers import TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.chat_template_utils import Chat

from .generation import AUTO
from .mixin import MESwitchMixin
from .routing.conversation import is_chat

__all__ = ["MESwitchTextGenerationPipeline", "register"]

_UNSET: Any = object()
_WRONG_NUMBER = "{} experts were named for {} inputs; name one per item of a list, or one for all."

#: The tokenizer of the expert at work in a pipeline. A context variable, so that threads do not swap it for another.
_AT_WORK: ContextVar[tuple[Any, Any] | None] = ContextVar("meswitch_tokenizer", default=None)


class MESwitchTextGenerationPipeline(TextGenerationPipeline):
    """transformers' text-generation pipeline; for models without experts it is exactly that.

    The base's tokenizer, which ``pipeline`` loads by itself, is replaced in each call by that of the expert at work.
    Any other tokenizer that the caller passes is used for every expert. One that the caller loaded from the base's (or
    family's) own id or folder cannot be told from the one that ``pipeline`` loads, so it is replaced too.

    ``expert=`` is accepted at construction (sticky) and per call, where a list names one per input. Calls from several
    threads do not mix, as far as the tokenizers allow: a fast tokenizer cannot change its padding or truncation while
    another thread uses it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._explicit_tokenizer = True
        super().__init__(*args, **kwargs)
        if self._experts_model is not None and self.tokenizer is not None:
            defaults = {str(self._experts_model.name_or_path), str(self._experts_model._meswitch_source)}
            self._explicit_tokenizer = str(getattr(self.tokenizer, "name_or_path", "")) not in defaults
            expert = self._expert(self._forward_params)
            if not self._explicit_tokenizer and expert is not None:
                self.tokenizer = self._left_padded(expert)

    @property
    def _experts_model(self) -> Any:
        """The model with experts, which may be inside a ``PeftModel``; `None` for a model without."""
        inner = self.model.base_model.model if isinstance(self.model, PeftModel) else self.model
        return inner if isinstance(inner, MESwitchMixin) else None

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The tokenizer of the expert at work; between calls, the one that the pipeline was made with."""
        chosen = _AT_WORK.get()
        return self._tokenizer if chosen is None or chosen[0] is not self else chosen[1]

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Complete the prompts as in transformers.

        Args:
            text_inputs: as in transformers; where a list of experts is given, a generator is read to its end first.
            *args: as in transformers.
            **kwargs: as in transformers, and ``expert``: a name for all inputs, or a list with one for each input;
                inputs of one expert are batched together. With ``"auto"`` the router reads the input and picks.

        Returns:
            As in transformers. With ``"auto"``, each answer also has ``"expert"``, the expert that gave it (`None` is
            the base), and ``"expert_probability"``, that of the router's likeliest expert.

        Raises:
            UnsupportedOperationError: ``"auto"`` without a router.
            ValueError: a list of experts for a single input, or of another length than the inputs.
        """
        if self._experts_model is not None:
            stated = self._stated({**self._forward_params, **kwargs})
            if stated == AUTO or (isinstance(stated, list | tuple) and AUTO in stated):
                return self._call_routed(text_inputs, stated, args, kwargs)
        experts = kwargs.get("expert")
        if experts is None or isinstance(experts, str):
            return super().__call__(text_inputs, *args, **kwargs)
        experts = list(experts)
        if not isinstance(text_inputs, (str, list)) and isinstance(text_inputs, Iterable):
            text_inputs = list(text_inputs)
        if not isinstance(text_inputs, list) or is_chat(text_inputs) or len(text_inputs) != len(experts):
            given = len(text_inputs) if isinstance(text_inputs, list) and not is_chat(text_inputs) else 1
            raise ValueError(_WRONG_NUMBER.format(len(experts), given))
        answers: dict[int, Any] = {}
        for expert in dict.fromkeys(experts):
            asked = [i for i, name in enumerate(experts) if name == expert]
            found = super().__call__([text_inputs[i] for i in asked], *args, **{**kwargs, "expert": expert})
            answers.update(zip(asked, found, strict=True))
        return [answers[i] for i in range(len(experts))]

    def _call_routed(self, text_inputs: Any, stated: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call in which the router picks the expert of some inputs, or of all; its answers say whom, how surely."""
        several = not (isinstance(text_inputs, str | Chat) or is_chat(text_inputs))
        inputs = list(text_inputs) if several else [text_inputs]
        names = list(stated) if isinstance(stated, list | tuple) else [AUTO] * len(inputs)
        asked = [i for i, name in enumerate(names) if name == AUTO]
        if len(names) != len(inputs):
            raise ValueError(_WRONG_NUMBER.format(len(names), len(inputs)))
        prompts = [inputs[i].messages if isinstance(inputs[i], Chat) else inputs[i] for i in asked]
        routed = self._experts_model.route(prompts)
        for place, i in enumerate(asked):
            names[i] = routed.experts[place]
        answers = self(inputs, *args, **{**kwargs, "expert": names})
        for place, i in enumerate(asked):
            for answer in answers[i]:
                answer["expert"] = names[i]
                answer["expert_probability"] = routed.confidence[place]
        return answers if several else answers[0]

    def _stated(self, parameters: dict[str, Any]) -> Any:
        """What names the expert of a call, by the precedence of ``generate``."""
        model, expert = self._experts_model, parameters.get("expert", _UNSET)
        if expert is _UNSET:
            # Releases differ in whether a pipeline keeps a generation config of its own.
            configs = (parameters.get("generation_config"), vars(self).get("generation_config"))
            stated = [vars(c) for c in (*configs, self.model.generation_config) if hasattr(c, "expert")]
            defaults = bool(stated) and not model._meswitch_switch.disabled
            expert = stated[0]["expert"] if defaults else model.active_expert
        return expert

    def _expert(self, parameters: dict[str, Any]) -> str | None:
        expert = self._stated(parameters)
        return expert if isinstance(expert, str) and expert in self._experts_model.experts else None

    def _left_padded(self, expert: str | None) -> Any:
        """An expert's tokenizer for batches of prompts, another object than the caller gets of ``tokenizer_for``."""
        tokenizer = self._experts_model.tokenizer_for(expert, padding_side="left")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @contextmanager
    def _tokenizer_of(self, parameters: dict[str, Any]) -> Iterator[None]:
        if self._experts_model is None or self._explicit_tokenizer:
            yield
            return
        token = _AT_WORK.set((self, self._left_padded(self._expert(parameters))))
        try:
            yield
        finally:
            _AT_WORK.reset(token)

    def _sanitize_parameters(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # Stop strings are matched against the vocabulary of the tokenizer found here.
        with self._tokenizer_of({**getattr(self, "_forward_params", {}), **kwargs}):
            preprocess, forward, postprocess = super()._sanitize_parameters(*args, **kwargs)
        config = forward.get("generation_config")
        chosen = next((c for c in (forward, vars(config) if config else {}) if "expert" in c), None)
        if chosen is not None:
            postprocess["expert"] = chosen["expert"]
        return preprocess, forward, postprocess

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, preprocess_params: Any, forward_params: Any, *args: Any
    ) -> Any:
        """As in transformers; prompts of a batch are padded with their expert's own padding token."""
        with self._tokenizer_of(forward_params):
            return super().get_iterator(inputs, num_workers, batch_size, preprocess_params, forward_params, *args)

    def preprocess(self, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokenise, and apply the chat template, of the call's expert."""
        with self._tokenizer_of({**self._forward_params, **kwargs}):
            return super().preprocess(prompt_text, *args, **kwargs)

    def postprocess(self, model_outputs: Any, *args: Any, expert: Any = _UNSET, **kwargs: Any) -> Any:
        """Decode with the tokenizer of the call's expert."""
        chosen = {} if expert is _UNSET else {"expert": expert}
        with self._tokenizer_of({**self._forward_params, **chosen}):
            return super().postprocess(model_outputs, *args, **kwargs)


def register() -> None:
    """Make it the class behind ``pipeline("text-generation")``. Idempotent."""
    PIPELINE_REGISTRY.supported_tasks["text-generation"]["impl"] = MESwitchTextGenerationPipeline
