"""What a model with experts does around its own forward pass."""

from __future__ import annotations

import threading
from typing import Any

import torch

from .errors import UnsupportedModelError, UnsupportedOperationError
from .peft_method.deltas import StoredDelta
from .peft_method.live_choice import is_replayed
from .peft_method.switch import ExpertSwitch

__all__ = ["ExpertCallMixin"]

#: One capture at a time: what layers share in a call is kept in the model.
_CAPTURING = threading.RLock()


class ExpertCallMixin:
    """``model(...)``, where the whole model must be seen rather than one layer."""

    _meswitch_switch: ExpertSwitch
    config: Any
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's class; arguments and results are the same.

        PEFT's ``adapter_names`` names an expert for each row of this call; ``"__base__"`` is the base.

        Raises:
            ExpertNotFoundError: an expert is not loaded.
            UnsupportedOperationError: gradient checkpointing with experts chosen for the call alone; another number of
                ``adapter_names`` than rows, or any while the call is compiled or captured; ``expert``.
            UnsupportedModelError: the model was offloaded by accelerate.
        """
        switch = self._meswitch_switch
        if "expert" in kwargs:
            # transformers' forward would take it among its free arguments and answer without it.
            raise UnsupportedOperationError(
                "The model's own call takes no expert. Choose with set_expert() before it, call generate(..., "
                "expert=...), or name one a row with adapter_names=[...]."
            )
        names = kwargs.pop("adapter_names", None)
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        batch = next((x.shape[0] for x in given if isinstance(x, torch.Tensor)), None)
        if is_replayed():
            if names is not None:
                raise UnsupportedOperationError(
                    "adapter_names cannot be given to a call that is compiled or captured, since it would not be "
                    "followed later. Give them to PeftModel's call or to generate, around the compiled model."
                )
            # The choice is read from tensors; what is checked below was checked by whoever made it.
            if torch.compiler.is_compiling():
                return self._replayed(batch, *args, **kwargs)
            with _CAPTURING:
                return self._replayed(batch, *args, **kwargs)
        if names is not None:
            if isinstance(names, str) or len(names) != batch:
                raise UnsupportedOperationError(
                    f"adapter_names is {names!r}, expected one name for each of {batch} rows."
                )
            with switch.rows(names):
                return self(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and switch.has_rows and self._checkpoints_gradients():
            raise UnsupportedOperationError(
                "Gradient checkpointing runs layers once more in the backward pass, when experts chosen for the call "
                "are no longer chosen, so gradients would be wrong. Choose one with set_expert(), or call "
                "gradient_checkpointing_disable()."
            )
        if "_hf_hook" in vars(self):
            self._refuse_offload()
        with switch.batch_of(batch):
            return self._masked(super().__call__(*args, **kwargs))  # type: ignore[misc]

    def _replayed(self, batch: int | None, *args: Any, **kwargs: Any) -> Any:
        """The call while it is compiled or captured, to be run again with other experts."""
        switch = self._meswitch_switch
        for live in switch.live.values():
            live.begin()
        switch.replayed_batch = batch
        try:
            return self._masked(super().__call__(*args, **kwargs))  # type: ignore[misc]
        finally:
            switch.replayed_batch = None
            for live in switch.live.values():
                live.end()

    def _masked(self, output: Any) -> Any:
        """The output with ``-inf`` at ids that a row's expert does not know, where the class changed the head's."""
        logits = getattr(output, "logits", None)
        if logits is not None and getattr(self.config.get_text_config(), "final_logit_softcapping", None):
            # Capping, which comes after the head, makes finite numbers of the head's -inf.
            output.logits = self._meswitch_switch.mask_unknown(logits)
        return output

    def _refuse_offload(self) -> None:
        first = next((m for m in self.modules() if isinstance(m, StoredDelta)), None)  # type: ignore[attr-defined]
        if first is not None and next(first.parameters()).is_meta:
            raise UnsupportedModelError(
                "The weights of the experts are on the device 'meta': the model was offloaded after they were loaded, "
                "which deltas do not support. Keep the model on devices that hold all of it, or load the base "
                "quantised with bitsandbytes."
            )

    def _checkpoints_gradients(self) -> bool:
        # Releases of transformers differ in what they call the property that says so.
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())  # type: ignore[attr-defined]
