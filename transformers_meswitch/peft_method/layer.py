"""What all wrapped layers share: the base's module beside the deltas of the experts that change it.

Each kind runs the base's own module on all rows and lets every expert in the batch correct its rows. The choice of
experts is read from the model's :class:`~transformers_meswitch.peft_method.switch.ExpertSwitch`, never from the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..delta_format.spec import ModuleRecord
from ..errors import UnsupportedOperationError
from .deltas import StoredDelta, make_delta
from .naming import module_key
from .switch import ExpertSwitch

__all__ = ["MESwitchLayer"]


def _settle_after_load(layer: Any, _: Any) -> None:
    """Tensors may be other ones now, and what was worked out of them is of the old values."""
    layer._settle_all()


class MESwitchLayer(nn.Module, BaseTunerLayer):
    """What all wrapped layers share: the deltas, PEFT's calls, and merging with a kept copy of the base's weights."""

    # Nothing here is trainable, and PEFT would set requires_grad on integer codes if it were told otherwise.
    adapter_layer_names = ()
    other_param_names = ("meswitch_delta",)

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.meswitch_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Any] | None = None
        self.register_load_state_dict_post_hook(_settle_after_load)

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is the base module's, such as a norm's ``variance_epsilon``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # What libraries hang on a module by underscored names (hooks) must not be seen twice.
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    @property
    def wrapped(self) -> nn.Module:
        """``base_layer``, past ``__getattr__``, which takes long beside what a small layer does in a call."""
        base = self._modules["base_layer"]
        assert base is not None
        return base

    # -- what an expert stores here ---------------------------------------------------------------------------------

    def add_delta(self, expert: str, record: ModuleRecord) -> None:
        """Make room for an expert's tensors, on the base layer's device."""
        self.drop_cache()
        parameter = next(self.get_base_layer().parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.get_default_dtype()
        self.meswitch_delta[module_key(expert)] = make_delta(record, dtype, parameter.device)

    def settle(self, expert: str) -> None:
        """Take note of an expert's tensors, which are all there now or have been moved."""

    @property
    def has_table(self) -> bool:
        """Whether there is something here that compiled code and graphs read to find experts."""
        return False

    def delta_of(self, expert: str | None) -> Any:
        """The expert's delta of this layer, or `None` where it does not differ from the base (or is the base)."""
        deltas = self._modules["meswitch_delta"]  # as in ``wrapped``
        assert deltas is not None
        return None if expert is None else deltas._modules.get(module_key(expert))

    def stored_delta(self, expert: str) -> StoredDelta:
        """The expert's delta of this layer; it must have one."""
        return self.meswitch_delta[module_key(expert)]  # type: ignore[return-value]

    # -- PEFT's calls: the state is the switch's, so all layers agree ------------------------------------------------

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """Adapters active in the whole model."""
        return list(self.switch.active)

    @property
    def disable_adapters(self) -> bool:  # type: ignore[override]
        """Whether adapters are off in the whole model."""
        return self.switch.disabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active in the whole model; see :meth:`ExpertSwitch.set_active`."""
        self.switch.set_active([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off in the whole model; turning them off unmerges this layer, as PEFT does."""
        if not enabled:
            self.unmerge()
        self.switch.disabled = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an expert's tensors; if it was active, the alphabetically first remaining expert becomes so."""
        self.drop_cache()
        if module_key(adapter_name) in self.meswitch_delta:
            del self.meswitch_delta[module_key(adapter_name)]
        self.switch.forget(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return {name for name in self.switch.experts if self.delta_of(name) is not None}

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._get_available_adapters())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        delta = self.delta_of(adapter_name)
        target = device or next(self.get_base_layer().parameters()).device
        if delta is not None and target.type != "meta":
            delta.to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: a delta is of full rank."""
        return False

    # -- merging ----------------------------------------------------------------------------------------------------

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's own parameters of this layer, as the base's module would hold them. Changes nothing."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an expert into the base's module, keeping the base's own parameters for :meth:`unmerge`.

        Args:
            safe_merge: refuse non-finite results before anything changes.
            adapter_names: the expert; the active one if `None`.

        Raises:
            UnsupportedOperationError: more than one expert, or a quantised base.
            ValueError: ``safe_merge`` and a non-finite weight.
        """
        names = [n for n in (adapter_names or self.switch.active) if n in self.switch.experts]
        if len(names) > 1:
            raise UnsupportedOperationError(f"Only one expert can be merged at a time, got {names}.")
        if not names or self.merged_adapters == names:
            return
        if self.merged_adapters:
            raise UnsupportedOperationError(
                f"Expert {self.merged_adapters[0]!r} is merged already; call unmerge_adapter() before merging another."
            )
        merged = self._checked_parameters(names[0], safe_merge)
        if merged:
            self._swap_parameters(merged)
        self.drop_cache()
        self.merged_adapters = names
        self.switch.merged = names[0]

    def check_merge(self, expert: str, safe_merge: bool) -> None:
        """Raise what :meth:`merge` would raise, without merging."""
        if self.delta_of(expert) is not None:
            self._refuse_quantised()
            if safe_merge:
                self._checked_parameters(expert, safe_merge)

    def unmerge(self) -> None:
        """Put the base's own parameters back: the very tensors that :meth:`merge` set aside."""
        if self._unmerged is not None:
            self._restore_parameters(self._unmerged)
            self._unmerged = None
        if self.merged_adapters:
            self.merged_adapters = []
            self.switch.merged = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> MESwitchLayer:
        # What unmerge() puts back must have followed model.to(...) as if it had never been set aside.
        super()._apply(fn, *args, **kwargs)
        if self._unmerged is not None:
            aside = nn.Module()
            aside._parameters.update(self._unmerged)
            self._unmerged = aside._apply(fn, *args, **kwargs)._parameters
        self._settle_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle_all()

    def drop_cache(self) -> None:
        """Give back the memory of what is worked out of tensors and kept, which layers of some kinds do."""

    def _settle_all(self) -> None:
        self.drop_cache()
        for expert in self.switch.experts:
            if expert != self.switch.pending:
                self.settle(expert)

    def _refuse_quantised(self) -> None:
        base = self.get_base_layer()
        quantised = next((n for n, p in base.named_parameters(recurse=False) if not p.is_floating_point()), None)
        if quantised is not None:
            raise UnsupportedOperationError(
                f"{type(base).__name__}.{quantised} is quantised; merging would round the expert away. Load the base "
                "without quantization_config to merge."
            )

    def _checked_parameters(self, expert: str, safe: bool) -> dict[str, torch.Tensor]:
        if self.delta_of(expert) is None:
            return {}
        base = self.get_base_layer()
        self._refuse_quantised()
        merged = self.merged_parameters(expert)
        for name, tensor in merged.items():
            if safe and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"Merging expert {expert!r} gives non-finite values in {type(base).__name__}.{name}; the base "
                    "weights were left as they are."
                )
        return merged

    def _swap_parameters(self, merged: dict[str, torch.Tensor]) -> None:
        base = self.get_base_layer()
        self._unmerged = {name: base._parameters[name] for name in merged}
        for name, tensor in merged.items():
            base._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _restore_parameters(self, kept: dict[str, Any]) -> None:
        self.get_base_layer()._parameters.update(kept)
