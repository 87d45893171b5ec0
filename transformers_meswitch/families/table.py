"""A family's table of experts, changed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ..configuration import MESwitchFamilyConfig
from ..errors import ExpertNotFoundError
from ..peft_method.naming import check_expert_name

__all__ = ["with_experts", "without_experts"]


def with_experts(
    config: MESwitchFamilyConfig, references: Mapping[str, Mapping[str, Any]], module_names: Collection[str] = ()
) -> MESwitchFamilyConfig:
    """The family with further experts.

    Args:
        config: the family.
        references: name to ``{"repo": ..., "revision": ...}``.
        module_names: dotted names of the base's modules, as far as they are known.

    Raises:
        ExpertNameError: a name that is taken, reserved or no name, or part of a module's.

    >>> family = MESwitchFamilyConfig("me/base", experts={"math": "me/math"})
    >>> list(with_experts(family, {"code": {"repo": "me/code", "revision": None}}).experts)
    ['code', 'math']
    """
    experts = dict(config.experts or {})
    for name, reference in references.items():
        check_expert_name(name, experts, module_names)
        experts[name] = dict(reference)
    changed = copy.deepcopy(config)
    changed.experts = dict(sorted(experts.items()))
    return changed


def without_experts(config: MESwitchFamilyConfig, names: Collection[str]) -> MESwitchFamilyConfig:
    """The family without some of its experts. If the default expert goes, the base answers by default.

    Raises:
        ExpertNotFoundError: the family has no such expert.

    >>> family = MESwitchFamilyConfig("me/base", experts={"math": "me/math"}, default_expert="math")
    >>> smaller = without_experts(family, ["math"])
    >>> smaller.experts, smaller.default_expert
    ({}, None)
    """
    experts = dict(config.experts or {})
    for name in names:
        if name not in experts:
            known = ", ".join(map(repr, experts)) or "none"
            raise ExpertNotFoundError(f"The family has no expert {name!r}. It has: {known}.")
    changed = copy.deepcopy(config)
    changed.experts = {name: reference for name, reference in experts.items() if name not in names}
    if config.default_expert in names:
        changed.default_expert = None
    return changed
