"""Expert names: which are allowed, and the safe key under which an expert's tensors are registered in a model.

PEFT uses an adapter's name as a path component of parameter names and filters state dicts by it, so a name such as
``mlp`` silently loses tensors of other experts on save, and a name with a dot is refused by ``nn.ModuleDict``. Experts
are therefore registered under an escaped key, and names that would still confuse PEFT's filters are refused.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Collection, Iterable

from ..delta_format.spec import LEAF_PREFIX, PEFT_TYPE
from ..errors import ExpertNameError, ExpertNotFoundError

__all__ = ["BASE_NAMES", "RESERVED_NAMES", "check_expert_name", "known_expert", "module_key"]

#: Names that mean "no expert" wherever a row's expert is asked for; ``__base__`` is PEFT's.
BASE_NAMES = ("__base__", "base")
RESERVED_NAMES = ("auto", *BASE_NAMES)
_RESERVED_CHARACTERS = ":/@"
#: Parts of the keys of any expert's tensors, by which PEFT would drop them when it saves another expert.
_KEY_PARTS = frozenset(
    [
        "base_layer",
        "bias",
        "codes",
        "column_step",
        "exact_index",
        "row_index",
        "rows",
        "salient",
        "salient_index",
        "step",
        "values",
        "weight",
    ]
)


@functools.lru_cache(maxsize=4096)  # every layer asks for it in every call
def module_key(name: str) -> str:
    """Key of an expert in an ``nn.ModuleDict``: reversible, without dots, never an attribute name.

    >>> module_key("qwen2.5-math")
    'x-qwen2%2E5-math'
    """
    return "x-" + urllib.parse.quote(name, safe="-_").replace(".", "%2E").replace("~", "%7E")


def check_expert_name(name: object, taken: Collection[str], module_names: Iterable[str]) -> str:
    """Refuse a name that cannot be told apart from a reserved word, another expert, or a part of the model.

    Args:
        name: the name asked for.
        taken: names of the adapters already on the model.
        module_names: dotted module names of the model.

    Returns:
        The name.

    Raises:
        ExpertNameError: says which rule the name breaks.
    """
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable() or name[0] == ".":
        raise ExpertNameError(
            f"{name!r} is not an expert name: expected printable text that does not start with a dot or a space."
        )
    if name in RESERVED_NAMES:
        raise ExpertNameError(f"{name!r} is reserved (reserved are {', '.join(RESERVED_NAMES)}); choose another name.")
    bad = next((c for c in _RESERVED_CHARACTERS if c in name), None)
    if bad is not None:
        raise ExpertNameError(f"{name!r} holds {bad!r}; the characters ': / @' are reserved. Choose another name.")
    if name in taken:
        raise ExpertNameError(f"An expert named {name!r} is already loaded. Delete it first or choose another name.")
    if name in _KEY_PARTS:
        raise ExpertNameError(
            f"{name!r} is part of the names of experts' tensors, which PEFT would take for that expert's. Choose "
            "another name."
        )
    if LEAF_PREFIX in name or name.lower() == PEFT_TYPE.lower():
        raise ExpertNameError(f"{name!r} collides with the PEFT prefix {LEAF_PREFIX!r}; choose another name.")
    dotted = f".{name}."
    for module_name in module_names:
        if dotted in f".{module_name}.":
            raise ExpertNameError(
                f"{name!r} is part of the module path {module_name!r}; PEFT would take that module's tensors for the "
                "expert's. Choose another name."
            )
    return name


def known_expert(name: object, experts: Collection[str]) -> str | None:
    """The expert that a caller means: a loaded name, or `None` for the base.

    Raises:
        ExpertNotFoundError: the name is not loaded; the message lists those that are.

    >>> known_expert("__base__", ["math"]) is None
    True
    """
    if name is None or name in BASE_NAMES:
        return None
    if not isinstance(name, str) or name not in experts:
        loaded = ", ".join(repr(e) for e in experts) or "none"
        raise ExpertNotFoundError(f"No expert named {name!r} is loaded. Loaded: {loaded}; None means the base.")
    return name
