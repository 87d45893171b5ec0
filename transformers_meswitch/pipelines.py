"""``pipeline("text-generation")`` with experts: each call uses the tokenizer and chat template of its expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .mixin import MESwitchMixin

__all__ = ["MESwitchTextGenerationPipeline", "register"]

_UNSET: Any = object()


class MESwitchTextGenerationPipeline(TextGenerationPipeline):
    """transformers' text-generation pipeline; for models without experts it is exactly that.

    A tokenizer passed by the caller is used for every expert; the base's, which ``pipeline`` loads by itself, is
    replaced by that of the expert at work. ``expert=`` is accepted at construction (sticky) and per call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._explicit_tokenizer = True
        super().__init__(*args, **kwargs)
        if isinstance(self.model, MESwitchMixin) and self.tokenizer is not None:
            defaults = {str(self.model.name_or_path), str(self.model._meswitch_source)}
            self._explicit_tokenizer = str(getattr(self.tokenizer, "name_or_path", "")) not in defaults
            expert = self._expert(self._forward_params)
            if not self._explicit_tokenizer and expert is not None:
                self.tokenizer = self._left_padded(self.model.tokenizer_for(expert))

    def _expert(self, parameters: dict[str, Any]) -> str | None:
        expert = parameters.get("expert", _UNSET)
        if expert is _UNSET:
            expert = getattr(self.model.generation_config, "expert", self.model.active_expert)
        return expert if isinstance(expert, str) and expert in self.model.experts else None

    @staticmethod
    def _left_padded(tokenizer: Any) -> Any:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @contextmanager
    def _tokenizer_of(self, parameters: dict[str, Any]) -> Iterator[None]:
        if not isinstance(self.model, MESwitchMixin) or self._explicit_tokenizer:
            yield
            return
        kept = self.tokenizer
        self.tokenizer = self._left_padded(self.model.tokenizer_for(self._expert(parameters)))
        try:
            yield
        finally:
            self.tokenizer = kept

    def _sanitize_parameters(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(*args, **kwargs)
        if "expert" in forward:
            postprocess["expert"] = forward["expert"]
        return preprocess, forward, postprocess

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
