"""``MultipleChoiceRouter``: a language model is asked which domain a prompt belongs to, as in the paper."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..delta_format.location import RepoLocation, is_plain_path
from ..errors import ExpertNameError, RouterError
from ..peft_method.naming import check_expert_name
from .base import BaseRouter, check_integer, check_number
from .files import write
from .letters import letter_logs, letter_prior
from .output import BASE_LABEL
from .question import MOST_OPTIONS, Question
from .window import window_ids

__all__ = ["MultipleChoiceRouter"]

#: Of no router, so that routers can be copied and pickled.
_LOADING = threading.Lock()


@dataclass(frozen=True, eq=False)
class MultipleChoiceRouter(BaseRouter):
    """Asks a causal LM, the base itself or another, a question whose options are the experts' domains.

    ME-Switch (arXiv 2406.09041) fine-tunes a 1.8B model to answer it, as ``examples/train_multiple_choice_router.py``
    does; without that, the router is as good as the model is at such questions. The answer is read from the logits of
    the options' letters, in one forward pass for each prompt.

    Models prefer some letters whatever the question. What they prefer is measured on queries that say nothing and
    divided out, see :mod:`.letters`. A model that was fine-tuned with shuffled options has little of that left, and
    takes those queries for some domain: dividing by its answer would send that domain's prompts to others.

    Attributes:
        domains: what each expert is for, in words, by label; the label ``"base"`` is the base.
        window: tokens of a prompt that are read at most, half at its beginning, half at its end.
        temperature: what scores are divided by.
        threshold: the router abstains where no expert is at least this likely.
        default_expert: who answers where it abstains; `None` is the base.
        repo: Hub id or folder of the causal LM to ask, a folder by its absolute path; `None` is the base that is
            loaded.
        divides_prior: whether the letters that the model prefers anyway are divided out; false for a model that was
            fine-tuned with shuffled options.

    >>> router = MultipleChoiceRouter({"math": "mathematics", "code": "programming"})
    >>> router.labels
    ['math', 'code']
    """

    domains: Mapping[str, str]
    window: int = 256
    temperature: float = 1.0
    threshold: float = 0.5
    default_expert: str | None = None
    repo: str | None = None
    divides_prior: bool = True
    _asked: dict[str, Any] = field(default_factory=dict, repr=False)

    router_type = "multiple_choice"

    def __post_init__(self) -> None:
        if not isinstance(self.domains, Mapping) or not 1 <= len(self.domains) <= MOST_OPTIONS:
            raise RouterError(
                f"domains is {self.domains!r:.80}, expected a mapping of 1 to {MOST_OPTIONS} experts to what they are "
                "for. For more experts use a HeadRouter."
            )
        for label, domain in self.domains.items():
            _check_label(label)
            if not isinstance(domain, str) or not domain.strip() or len(domain) > 1000:
                raise RouterError(f"The domain of {label!r} is {domain!r:.80}, expected a short text.")
        if self.default_expert is not None:
            _check_label(self.default_expert)
        check_integer("window", self.window, 2, 4096)
        check_number("temperature", self.temperature, 1e-6, 1e6)
        check_number("threshold", self.threshold, 0.0, 1.0)
        if self.repo is not None and not isinstance(self.repo, str):
            raise RouterError(f"repo is {self.repo!r}, expected the Hub id or folder of a causal LM, or None.")
        if not isinstance(self.divides_prior, bool):
            raise RouterError(f"divides_prior is {self.divides_prior!r}, expected true or false.")
        if self.repo is not None and Path(self.repo).is_dir():  # which from another folder could be read as a Hub id
            object.__setattr__(self, "repo", str(Path(self.repo).resolve()))

    @property
    def labels(self) -> list[str]:
        """The experts it knows, in the order of the options; ``"base"`` is the base."""
        return list(self.domains)

    def with_expert(self, expert: str, domain: str) -> MultipleChoiceRouter:
        """This with one more option, or another text for one that it has."""
        return dataclasses.replace(self, domains={**self.domains, expert: domain}, _asked={})

    def only(self, labels: Sequence[str]) -> MultipleChoiceRouter | None:
        """This with those of its experts that are among ``labels``; `None` if it knows none of them."""
        domains = {label: domain for label, domain in self.domains.items() if label in labels}
        default = self.default_expert if self.default_expert in labels else None
        return dataclasses.replace(self, domains=domains, default_expert=default, _asked={}) if domains else None

    def check(self, model: Any) -> None:
        """Refuse a model that cannot be asked: one without an output head, where the base is to be.

        Raises:
            RouterError: the model has no output head.
        """
        if self.repo is None and model.get_output_embeddings() is None:
            raise RouterError(
                f"{type(model).__name__} has no output head, so it cannot be asked a question. Load the family with "
                "MESwitchModelForCausalLM, or name another causal LM: MultipleChoiceRouter(..., repo=...)."
            )

    # -- routing ----------------------------------------------------------------------------------------------------

    def judge(self, model: Any, rows: Sequence[Sequence[int]], labels: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """As of every router; there is nothing that it can tell to be strange."""
        asked, tokenizer = self._to_ask(model)
        if self.repo is not None:
            texts = [model.tokenizer_for(None).decode(row, skip_special_tokens=False) for row in rows]
            rows = window_ids(tokenizer, texts, self.window)  # other tokens, and perhaps more of them
        question = Question.of(tokenizer, [self.domains[label] for label in labels])
        with model._meswitch_switch.rows([None]):
            scores = torch.stack([letter_logs(asked, question, row) for row in rows])
            if self.divides_prior:
                scores = scores - letter_prior(asked, tokenizer, question)
        return (scores / self.temperature).softmax(dim=1), torch.zeros(len(rows), dtype=torch.bool)

    def _to_ask(self, model: Any) -> tuple[Any, Any]:
        if self.repo is None:
            return model, model.tokenizer_for(None)
        with _LOADING:
            if "pair" not in self._asked:
                tokenizer = AutoTokenizer.from_pretrained(self.repo)
                asked = AutoModelForCausalLM.from_pretrained(self.repo, dtype="auto", use_safetensors=True).eval()
                self._asked["pair"] = asked, tokenizer
            asked, tokenizer = self._asked["pair"]
            return asked.to(model.device), tokenizer

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``router_config.json``; a language model that it names is not copied.

        One inside the folder is named relative to it, as ``./model``, any other local one by its absolute path.
        """
        names = ("window", "temperature", "threshold", "default_expert", "divides_prior")
        config = {"router_type": self.router_type, "domains": dict(self.domains)}
        config |= {name: getattr(self, name) for name in names}
        repo, folder = self.repo, Path(save_directory).resolve()
        if repo is not None and Path(repo).is_absolute() and folder in Path(repo).parents:
            repo = f"./{Path(repo).relative_to(folder).as_posix()}"
        write(folder, config | {"repo": repo}, {})

    @classmethod
    def from_files(cls, config: Mapping[str, Any], location: RepoLocation) -> MultipleChoiceRouter:
        """What :func:`~.files.read_config` found, checked."""
        names = {f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")}
        config = {**config, "repo": _asked_repo(config.get("repo"), location)}
        try:
            return cls(**{"domains": {}, **{name: value for name, value in config.items() if name in names}})
        except RouterError as error:
            raise RouterError(f"{location}: {error}") from error


def _asked_repo(repo: Any, location: RepoLocation) -> Any:
    """The model that a router's config names, where ``./model`` is in the router's own folder."""
    if not isinstance(repo, str) or not repo.startswith("./"):
        return repo
    if not location.is_local or not is_plain_path(repo[2:]):
        raise RouterError(
            f"{location}: repo is {repo!r}, expected the Hub id of a causal LM, or for a router in a folder of this "
            "machine a folder inside that."
        )
    return str(Path(location.repo, location.subfolder or "", repo).resolve())


def _check_label(label: Any) -> None:
    try:
        if label != BASE_LABEL:
            check_expert_name(label, (), ())
    except ExpertNameError as error:
        raise RouterError(str(error)) from error
