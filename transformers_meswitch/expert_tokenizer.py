"""An expert's own tokenizer, chat template included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .delta_format.location import RepoLocation
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
        assets = None if name is None else switch.experts[name].assets
        if assets is None or assets.find(_TOKENIZER_CONFIG) is None:
            source, extra = self.name_or_path, switch.base_download
        else:
            source, extra = _source(assets)
        cache = self.__dict__.setdefault("_meswitch_tokenizers", {})
        key = (source, tuple(sorted((k, str(v)) for k, v in {**extra, **kwargs}.items())))
        if key not in cache:
            cache[key] = AutoTokenizer.from_pretrained(source, **{**extra, **kwargs})
        return cache[key]


def _source(location: RepoLocation) -> tuple[str, dict[str, Any]]:
    """What to give ``AutoTokenizer`` for a repo: its folder, or its id at the commit that was loaded."""
    if location.is_local:
        return str(Path(location.repo) / (location.subfolder or "")), {}
    return location.repo, {
        "revision": location.revision,
        "subfolder": location.subfolder or "",
        "token": location.token,
        "cache_dir": location.cache_dir,
        "local_files_only": location.local_files_only,
    }
