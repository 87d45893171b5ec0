"""An expert's own tokenizer, chat template included."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from .compression.assets import find_assets
from .peft_method.naming import known_expert
from .peft_method.switch import ExpertSwitch

__all__ = ["TokenizerMixin"]

_TOKENIZER_CONFIG = "tokenizer_config.json"


class TokenizerMixin:
    """``tokenizer_for``: fine-tunes add tokens and change chat templates, so each expert brings its tokenizer."""

    _meswitch_switch: ExpertSwitch
    name_or_path: str

    def tokenizer_for(self, expert: str | None = None, **kwargs: Any) -> Any:
        """The tokenizer (and chat template) that an expert was trained with.

        Args:
            expert: a loaded expert; `None` is the base.
            **kwargs: passed to ``AutoTokenizer.from_pretrained``.

        Returns:
            A transformers tokenizer: the delta repo's, or the base's where the delta repo has none.

        Raises:
            ExpertNotFoundError: the expert is not loaded.
            OSError: the base has no tokenizer either.
        """
        switch = self._meswitch_switch
        name = known_expert(expert, switch.experts)
        loaded = switch.tokenizers.setdefault(name, {})
        key = repr(sorted(kwargs.items()))
        if key in loaded:
            return loaded[key]
        assets = None if name is None else switch.experts[name].assets
        config = None if assets is None else assets.find(_TOKENIZER_CONFIG)
        if assets is None or config is None:
            loaded[key] = AutoTokenizer.from_pretrained(self.name_or_path, **{**switch.base_download, **kwargs})
        else:
            # Fetched file by file, so that the commit and cache are those of the delta; then it is a folder like any.
            find_assets(assets)
            loaded[key] = AutoTokenizer.from_pretrained(config.parent, **kwargs)
        return loaded[key]
