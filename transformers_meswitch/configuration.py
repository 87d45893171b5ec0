"""The three configurations: of the producer, of one expert's delta, and of a family."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from transformers import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compression.presets import BUDGETS, PRESETS
from .delta_format.spec import FORMAT_RELEASES, FORMAT_VERSION, PEFT_TYPE, SUPPORTED_BITS, ModuleRecord, parse_record
from .errors import CompressionError, DeltaFormatError, FormatVersionError
from .sizes import parse_size

if TYPE_CHECKING:
    from .delta_format.reader import DeltaFiles

__all__ = [
    "MESwitchConfig",
    "MESwitchExpertConfig",
    "MESwitchFamilyConfig",
    "expert_references",
    "reference_in_family",
]


class _PeftTypeName(str):
    """A ``PeftType`` member in all that PEFT and transformers ask of one, without touching PEFT's closed enum.

    PEFT looks methods up by hash in plain dictionaries and reads ``.value``; both work on this string.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    name = value


#: Bits a weight that a budget may give at most: 4 of a code, with room for steps and salient channels.
_MOST_TARGET_BITS = 6

#: The key under which the method is registered with PEFT.
MESWITCH = _PeftTypeName(PEFT_TYPE)


class MESwitchConfig(QuantizationConfigMixin):
    """How to compress a fine-tuned checkpoint into a delta against its base.

    Pass it as ``quantization_config`` to ``AutoModelForCausalLM.from_pretrained(expert, ...)`` or to
    :func:`transformers_meswitch.compress`.

    Args:
        base_model_name_or_path (`str` or `os.PathLike`): the base that the expert was fine-tuned from.
        base_revision (`str`, *optional*): branch, tag or commit of the base.
        bits (`int`, defaults to 2): bits of one code, 1 to 4.
        salient_channels (`int`, defaults to 16): input channels per layer kept in bfloat16; capped at a layer's width.
        column_steps (`bool`, defaults to `False`): also fit a step per input channel.
        layer_bits (`dict[str, int]`, *optional*): regular expression on module names to bits; the first match wins,
            and one that matches no module to quantise is refused when a model is compressed.
        embedding_bits (`int`, *optional*, defaults to 3): bits of one code in changed rows of embeddings and of the
            output head, 1 to 4; `None` keeps those rows as they are.
        target_bits (`float`, *optional*): a budget: bits a weight that the linear layers of the delta may take
            together, codes, steps and salient channels counted. Each layer gets the bits, 1 to 4, and the salient
            channels, from none to four times ``salient_channels``, that lose least within it.
        target_size (`int` or `str`, *optional*): the same for the bytes of the whole delta on disk, weights and
            ``adapter_config.json``: an integer, or a text such as ``"1.2GB"`` or ``"1GiB"``.
        max_kl (`float`, *optional*): the smallest delta whose predictions stay this close to the expert's: mean
            KL divergence in nats a token, on a part of the calibration text that is kept apart for it.

    At most one of the three budgets may be given. A budget takes the place of ``bits``; ``layer_bits`` holds within
    it, and pins the layers that it names to those bits and to ``salient_channels``.

    Raises:
        CompressionError: bits, channels or a budget out of range, an argument of another type, an unknown one, two
            budgets.

    >>> config = MESwitchConfig("me/base", bits=2, layer_bits={r"down_proj$": 4})
    >>> config.bits_of("model.layers.0.mlp.down_proj"), config.row_bits_of("model.embed_tokens")
    (4, 3)
    >>> MESwitchConfig(target_size="1.2GB").budget
    ('target_size', 1200000000)
    """

    def __init__(
        self,
        base_model_name_or_path: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        bits: int = 2,
        salient_channels: int = 16,
        column_steps: bool = False,
        layer_bits: dict[str, int] | None = None,
        embedding_bits: int | None = 3,
        target_bits: float | None = None,
        target_size: int | str | None = None,
        max_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise CompressionError(
                f"MESwitchConfig got unknown arguments {sorted(kwargs)}; known are base_model_name_or_path, "
                "base_revision, bits, salient_channels, column_steps, layer_bits, embedding_bits, target_bits, "
                "target_size and max_kl."
            )
        self.quant_method = "meswitch"  # type: ignore[assignment]  # transformers allows a plain string
        if isinstance(base_model_name_or_path, os.PathLike):  # a path is no JSON
            base_model_name_or_path = os.fspath(base_model_name_or_path)
        for where, text in (("base_model_name_or_path", base_model_name_or_path), ("base_revision", base_revision)):
            if text is not None and not isinstance(text, str):
                raise CompressionError(f"{where} is {text!r}, expected a text or None.")
        if not isinstance(column_steps, bool):
            raise CompressionError(f"column_steps is {column_steps!r}, expected True or False.")
        if layer_bits is not None and not isinstance(layer_bits, Mapping):
            raise CompressionError(
                f"layer_bits is {layer_bits!r}, expected a mapping from regular expressions on module names to bits, "
                'such as {"down_proj$": 3}.'
            )
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.bits = bits
        self.salient_channels = salient_channels
        self.column_steps = column_steps
        self.layer_bits = dict(layer_bits or {})
        self.embedding_bits = embedding_bits
        for where, value in [("bits", bits), *((f"layer_bits[{k!r}]", v) for k, v in self.layer_bits.items())]:
            if isinstance(value, bool) or not isinstance(value, int) or value not in SUPPORTED_BITS:
                raise CompressionError(f"{where} is {value!r}; supported are {SUPPORTED_BITS}.")
        if embedding_bits is not None and (isinstance(embedding_bits, bool) or embedding_bits not in SUPPORTED_BITS):
            raise CompressionError(f"embedding_bits is {embedding_bits!r}; supported are {SUPPORTED_BITS} and None.")
        if isinstance(salient_channels, bool) or not isinstance(salient_channels, int) or salient_channels < 0:
            raise CompressionError(f"salient_channels is {salient_channels!r}, expected an integer of at least 0.")
        for pattern in self.layer_bits:
            if not isinstance(pattern, str):
                raise CompressionError(f"layer_bits: {pattern!r} is not a regular expression, which is a text.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise CompressionError(f"layer_bits: {pattern!r} is not a regular expression ({error}).") from error
        self.target_bits = _number("target_bits", target_bits, _MOST_TARGET_BITS)
        self.target_size = _size(target_size)
        self.max_kl = _number("max_kl", max_kl, math.inf)
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise CompressionError(
                f"{' and '.join(f'{name}={getattr(self, name)!r}' for name in given)} are given together; "
                "a budget is one of them. Leave the others out."
            )

    @classmethod
    def from_preset(
        cls,
        name: str,
        base_model_name_or_path: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        **overrides: Any,
    ) -> MESwitchConfig:
        """The settings that a preset stands for.

        Args:
            name: ``"lossless"``, the defaults of this class; ``"balanced"``, a budget of 1.5 bits a weight; or
                ``"smallest"``, one bit; see :data:`~transformers_meswitch.compression.presets.PRESETS`.
            base_model_name_or_path: the base that the expert was fine-tuned from.
            base_revision: branch, tag or commit of the base.
            **overrides: arguments of this class that win over the preset's. Bits or a budget of your own take the
                place of the preset's budget.

        Raises:
            CompressionError: an unknown name; as for the class.

        >>> config = MESwitchConfig.from_preset("smallest", "me/base", salient_channels=8)
        >>> config.bits, config.salient_channels, config.column_steps
        (1, 8, True)
        """
        if name not in PRESETS:
            raise CompressionError(f"There is no preset {name!r}; known are {', '.join(PRESETS)}.")
        settings = dict(PRESETS[name])
        if any(overrides.get(key) is not None for key in ("bits", *BUDGETS)):
            for key in BUDGETS:
                settings.pop(key, None)
        return cls(base_model_name_or_path, base_revision, **(settings | overrides))

    @property
    def peft_type(self) -> str:
        """There is none: PEFT asks its own configs for it.

        Raises:
            AttributeError: always, with what to do instead.
        """
        raise AttributeError(
            "A MESwitchConfig says how a finished fine-tune is compressed, it is no config of an adapter to train. "
            "Compress with AutoModelForCausalLM.from_pretrained(expert, quantization_config=MESwitchConfig(base)), "
            "and attach what that saves with PeftModel.from_pretrained(base, delta) or base.load_adapter(delta)."
        )

    @property
    def budget(self) -> tuple[str, float] | None:
        """The budget's name and value; `None` where ``bits`` holds."""
        return next(((name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None), None)

    def is_pinned(self, module: str) -> bool:
        """Whether a pattern of ``layer_bits`` states a module's bits, so that a budget does not choose them."""
        return any(re.search(pattern, module) for pattern in self.layer_bits)

    def with_codes(self, bits: int, salient_channels: int, column_steps: bool) -> MESwitchConfig:
        """These settings without a budget, and with the same codes for all linear layers.

        >>> MESwitchConfig(target_bits=1.5, layer_bits={"q_proj": 4}).with_codes(3, 8, False).bits_of("q_proj")
        3
        """
        settings = self.to_dict() | dict.fromkeys(BUDGETS) | {"layer_bits": {}}
        codes = {"bits": bits, "salient_channels": salient_channels, "column_steps": column_steps}
        return type(self)(**(settings | codes))

    def bits_of(self, module: str) -> int:
        """Bits for one module: the first ``layer_bits`` pattern found in its name, else ``bits``."""
        return self._stated_bits(module, self.bits)

    def row_bits_of(self, module: str) -> int | None:
        """Bits for the changed rows of an embedding or output head, or `None` to keep them exact.

        As :meth:`bits_of`, with ``embedding_bits`` in the place of ``bits``.
        """
        return None if self.embedding_bits is None else self._stated_bits(module, self.embedding_bits)

    def _stated_bits(self, module: str, default: int) -> int:
        return next((b for pattern, b in self.layer_bits.items() if re.search(pattern, module)), default)


def _number(name: str, value: Any, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most or math.isinf(value):
        limit = "" if math.isinf(most) else f" and at most {most}"
        raise CompressionError(f"{name} is {value!r}, expected a number above 0{limit}.")
    return value


def _size(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            value = parse_size(value)
        except ValueError as error:
            raise CompressionError(f"target_size: {error}.") from error
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise CompressionError(
            f"target_size is {value!r}, expected bytes as an integer above 0, or a text such as '1.2GB'."
        )
    return value


@dataclass
class MESwitchExpertConfig(PeftConfig):
    """``adapter_config.json`` of a delta repo.

    Args:
        format_version: version of the delta format, see ``docs/delta_format.md``.
        format_release: first release of this package that reads the version; follows from ``format_version``.
        bits: bits asked for when the delta was made, `None` where a budget chose them; each module's own are in
            ``modules``.
        salient_channels: salient input channels asked for.
        modules: canonical module name to its record (:mod:`transformers_meswitch.delta_format.spec`).
        base_model_type: ``model_type`` of the base's config.
        base_fingerprint: digests of the base checkpoint's bytes, see :mod:`~.delta_format.fingerprint`.
        vocab_size: rows of the expert's input embedding.
        tie_word_embeddings: whether the expert's output head is its input embedding.
        eos_token_id: token ids that end the expert's answer.
        pad_token_id: the expert's padding token.
        expert_model_name_or_path: Hub id of the fine-tune the delta was made from.
        saliency: how salient channels were chosen, ``"reconstruction"`` or ``"weight"``.
        calibration: where the text that the delta was calibrated on can be read again:
            see :func:`~.compression.calibration_record.calibration_record`.
        distilled: how step sizes were trained on the expert's logits, see :func:`transformers_meswitch.distill`:
            ``steps``, ``text``, and KL from the expert on held-out text, ``kl_before`` and ``kl_after``.
        imported_from: method that made the delta, where it was not this package: ``"BitDelta"``.
    """

    format_version: int = FORMAT_VERSION
    format_release: str | None = None
    bits: int | None = None
    salient_channels: int | None = None
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    base_model_type: str | None = None
    base_fingerprint: dict[str, Any] | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    eos_token_id: list[int] | None = None
    pad_token_id: int | None = None
    expert_model_name_or_path: str | None = None
    saliency: str | None = None
    calibration: dict[str, Any] | None = None
    distilled: dict[str, Any] | None = None
    imported_from: str | None = None
    #: PEFT reads this from every tuner's config; the modules table replaces it.
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MESWITCH  # type: ignore[assignment]
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise DeltaFormatError(
                f"adapter_config.json: format_version is {self.format_version!r}, expected 1 or more."
            )
        if self.format_version > FORMAT_VERSION:
            raise FormatVersionError(
                f"This delta is in format version {self.format_version}; this release of transformers-meswitch reads "
                f"up to version {FORMAT_VERSION}. Upgrade transformers-meswitch to a release that reads version "
                f"{self.format_version}{_or_later(self.format_release)}."
            )
        self.format_release = FORMAT_RELEASES.get(self.format_version)
        if not isinstance(self.modules, dict):
            raise DeltaFormatError(
                f"adapter_config.json: modules is {type(self.modules).__name__}, expected an object."
            )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; a delta that was not calibrated, distilled or imported has nothing to say of it."""
        content = super().to_dict()
        for key in ("calibration", "distilled", "imported_from"):
            if content.get(key) is None:
                content.pop(key, None)
        return content

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MESwitchExpertConfig:
        """Read the config of a delta repo, and check that its weight files hold what the config announces.

        PEFT reads an adapter's config before it touches a model and its weights after; a repo that is incomplete is
        found here. Values are checked when the tensors are handed to the model, which is undone if they are damaged.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            subfolder: folder inside the repo.
            **kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``; others are
                PEFT's and mean nothing for a delta.

        Raises:
            DeltaFormatError: anything missing or malformed, naming the file and the tensor.
        """
        from .delta_format.reader import open_delta, resolve_delta

        known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        download = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
        delta = open_delta(resolve_delta(pretrained_model_name_or_path, subfolder=subfolder, **download))
        delta.config.__dict__["_files"] = delta.files
        return delta.config

    @property
    def files(self) -> DeltaFiles | None:
        """The delta repo that the config was read from by :meth:`from_pretrained`; not a field, and never saved."""
        return self.__dict__.get("_files")

    def revision_of(self, base: str | os.PathLike[str]) -> str | None:
        """The commit of a base that the delta was formed against, if the delta knows it and names this base.

        >>> config = MESwitchExpertConfig(base_model_name_or_path="me/base", revision="c0ffee")
        >>> config.revision_of("me/base"), config.revision_of("./base")
        ('c0ffee', None)
        """
        return self.revision if os.fspath(base) == self.base_model_name_or_path else None

    def records(self) -> dict[str, ModuleRecord]:
        """The parsed ``modules`` table.

        Raises:
            DeltaFormatError: a malformed entry.
        """
        return {name: parse_record(name, entry) for name, entry in self.modules.items()}


def _or_later(release: object) -> str:
    """The release that a delta says it needs, for a message: a number, not whatever a stranger's file may hold."""
    known = isinstance(release, str) and re.fullmatch(
        r"\d{1,4}(\.\d{1,4}){1,3}((a|b|rc|\.post|\.dev)\d{1,4})?", release
    )
    return f": {release} or later" if known else ""


class MESwitchFamilyConfig(PreTrainedConfig):
    """``config.json`` of a family repo: the base and where each expert's delta lives.

    Args:
        base_model_name_or_path (`str`): id or path of the base; ``./path`` is inside the family repo.
        base_revision (`str`, *optional*): branch, tag or commit of the base.
        base_subfolder (`str`, *optional*): folder inside the base's repo.
        experts (`dict[str, dict]`): expert name to ``{"repo": id or "./path", "revision": str | None}``, and
            ``"subfolder"`` where needed.
        default_expert (`str`, *optional*): the expert that is active after loading; `None` is the base.
        router (`dict`, *optional*): ``{"router_type": ...}`` of the family's router, which is in
            ``router_config.json`` and ``router.safetensors`` beside this.
        base_quantization (`dict`, *optional*): how bitsandbytes had quantised the base when the family was saved. Only
            a record: the base is loaded as the caller asks.

    Raises:
        DeltaFormatError: an entry of another type, or a ``./path`` that leads out of the family repo.

    >>> MESwitchFamilyConfig("me/base", experts={"math": "me/math-delta"}).experts
    {'math': {'repo': 'me/math-delta', 'revision': None}}
    """

    model_type = "meswitch"

    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_subfolder: str | None = None
    experts: dict[str, Any] | None = None
    default_expert: str | None = None
    router: dict[str, Any] | None = None
    base_quantization: dict[str, Any] | None = None

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        experts: Mapping[str, Any] | None = None,
        default_expert: str | None = None,
        router: dict[str, Any] | None = None,
        base_subfolder: str | None = None,
        base_quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base_model_name_or_path = _text("base_model_name_or_path", base_model_name_or_path)
        _check_inside("base_model_name_or_path", self.base_model_name_or_path)
        self.base_revision = _text("base_revision", base_revision)
        self.base_subfolder = _text("base_subfolder", base_subfolder)
        self.experts = expert_references(experts or {})
        for name, reference in self.experts.items():
            _check_inside(f"experts[{name!r}]", reference["repo"])
        self.default_expert = _text("default_expert", default_expert)
        if router is not None and not isinstance(router, Mapping):
            raise DeltaFormatError(f"A family's router is {router!r}, expected an object or null.")
        self.router = None if router is None else dict(router)
        self.base_quantization = base_quantization
        super().__init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing: transformers would copy this module into the repos that a family is saved to."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but experts of the caller replace the family's whole table, its default expert too."""
        if "experts" not in kwargs:
            return super().from_dict(config_dict, **kwargs)
        experts = kwargs.pop("experts")
        if kwargs.get("return_unused_kwargs"):
            # An Auto class asks, and hands on to the loader what is returned as unused.
            config, unused = super().from_dict(config_dict, **kwargs)
            return config, {**unused, "experts": experts}
        return super().from_dict({**config_dict, "experts": experts, "default_expert": None}, **kwargs)


def expert_references(experts: object) -> dict[str, dict[str, Any]]:
    """A table of experts in full form: name to ``{"repo": ..., "revision": ...}`` and ``"subfolder"`` where given.

    Args:
        experts: name to repo (id or path), or to a mapping with ``"repo"`` and, if need be, the others.

    Raises:
        DeltaFormatError: an entry of another type, naming it.

    >>> expert_references({"math": "me/math-delta"})
    {'math': {'repo': 'me/math-delta', 'revision': None}}
    """
    if not isinstance(experts, Mapping):
        raise DeltaFormatError(
            f"experts is {experts!r}, expected a mapping from each expert's name to its delta repo, such as "
            '{"math": "me/math-delta"}.'
        )
    references = {}
    for name, given in experts.items():
        reference = dict(given) if isinstance(given, Mapping) else {"repo": given}
        unknown = sorted(map(str, reference.keys() - {"repo", "revision", "subfolder"}))
        repo = reference.get("repo")
        if unknown or not isinstance(repo, str | os.PathLike) or not os.fspath(repo):
            raise DeltaFormatError(
                f"experts[{name!r}] is {given!r}, expected a delta repo: a Hub id, a path, or a mapping with 'repo' "
                "and, if need be, 'revision' and 'subfolder'."
            )
        reference |= {"repo": os.fspath(repo), "revision": reference.get("revision")}
        for key in ("revision", "subfolder"):
            _text(f"experts[{name!r}][{key!r}]", reference.get(key))
        references[name] = reference
    return references


def reference_in_family(family: str, reference: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Where an expert of a family is: ``./path`` is inside the family repo, at its revision and in its subfolder.

    Args:
        family: the family's Hub id or folder.
        reference: an entry of its table of experts, in full form.
        where: ``revision`` and ``subfolder`` of the family, as far as there are any.

    >>> reference_in_family("me/family", {"repo": "./experts/math"}, {"revision": "v1"})
    {'repo': 'me/family', 'revision': 'v1', 'subfolder': 'experts/math'}
    """
    repo = str(reference["repo"])
    if not repo.startswith("./"):
        return dict(reference)
    parts = (where.get("subfolder"), repo[2:].rstrip("/"), reference.get("subfolder"))
    revision = reference.get("revision") or where.get("revision")
    return {"repo": family, "revision": revision, "subfolder": "/".join(filter(None, parts))}


def _text(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DeltaFormatError(f"A family's {key} is {value!r}, expected a text or null. Correct its config.json.")
    return value


def _check_inside(key: str, reference: str | None) -> None:
    """``./path`` is inside the family repo, and a family from elsewhere must not reach out of it."""
    # At import, the reader of deltas needs this module.
    from .delta_format.location import is_plain_path

    if reference is not None and reference.startswith("./") and not is_plain_path(reference[2:].rstrip("/")):
        raise DeltaFormatError(
            f"A family's {key} is {reference!r}; a path that starts with './' must stay inside the family repo. "
            "Name a folder in it, a Hub id, or a full path."
        )
