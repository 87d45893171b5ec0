"""``PeftModel`` around a model with experts: its active adapter is the one that the switch says."""

from __future__ import annotations

import functools
from typing import Any

from .injection import require_gradients, switch_of

__all__ = ["follow_switch"]


class _FollowsSwitch:
    """Mixed into a ``PeftModel``, whose own note of the active adapter misses what the model inside is told."""

    peft_config: dict[str, Any]

    @property
    def active_adapter(self) -> Any:
        """The active expert; while the base answers, the last one noted that is still loaded."""
        switch = switch_of(self.base_model.model)  # type: ignore[attr-defined]  # get_base_model() asks us
        if switch is not None and switch.active:
            return switch.active[0]
        noted = self.__dict__["_noted_adapter"]
        # PEFT looks the active adapter's config up before every call.
        return next(iter(self.peft_config), noted) if noted not in self.peft_config else noted

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        self.__dict__["_noted_adapter"] = name

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As of any module, for the base's parameters; deltas cannot be trained."""
        return require_gradients(self, requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the class that it was made from."""
        return _restore, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _following(base: Any) -> Any:
    # The base's own name: libraries compare class names.
    return type(base.__name__, (_FollowsSwitch, base), {"__module__": base.__module__})


def _restore(base: type) -> Any:
    made = _following(base)
    return made.__new__(made)


def follow_switch(model: Any) -> None:
    """Let ``model.active_adapter`` be what the switch of the model inside says. Idempotent."""
    if not isinstance(model, _FollowsSwitch):
        model.__dict__["_noted_adapter"] = model.__dict__.pop("active_adapter")
        base: Any = type(model)
        model.__class__ = _following(base)
