"""A causal LM that runs on calibration tokens decoder layer by decoder layer, with the weights of one in memory.

The tokens go through the embedding once; from then on only their hidden states are kept, one set for the whole model,
and moved from layer to layer. What a decoder layer is given beside the hidden states (masks, position embeddings) does
not depend on them, so it is recorded in that first pass, in which every layer is replaced by one that hands its input
on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CompressionError
from ..module_kinds import is_linear
from .batches import Batch
from .finite import all_finite
from .sources import Parameters, output_head

__all__ = ["LayeredModel", "LayersNotApartError", "decoder_layers", "hidden_of"]

#: What runs in the place of a layer: its number from 0, and what it is given.
_Stub = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
#: What a layer is given: hidden states, and arguments by place and by name.
_Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


class LayersNotApartError(Exception):
    """The model does something between or beside its layers that handing hidden states on would miss."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The decoder layers of a causal LM and their name; `None` if they cannot be told apart from the rest.

    Args:
        model: on any device, ``meta`` included.
    """
    count = model.config.get_text_config().num_hidden_layers
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and len(set(module)) == count
            and len({type(layer) for layer in module}) == 1
            and any(map(is_linear, module.modules()))
            and not any(name.startswith(f"{outer}.") for outer, _ in found)
        ):
            found.append((name, module))
    return found[0] if len(found) == 1 else None


class LayeredModel:
    """The structure of a causal LM, weights that come and go, and the hidden states of some text.

    Stages: 0 is what comes before the layers, i the i-th layer from 1, the last what comes after.

    Args:
        config: of the causal LM.
        parameters: its weights.
        batches: the token ids to run.
        device: where to run.
        dtype: dtype to run in.
        progress: whether to show a progress bar for each layer.

    Attributes:
        model: the causal LM; parameters that are not loaded are on the meta device.
        layers: its decoder layers; empty where they cannot be told apart.
        head: name of the output head.
        stage_of: name of each linear, and of the head, to its stage.
        hidden: for each batch, what the next layer is given: ``[rows, length, hidden]``.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        parameters: Parameters,
        batches: Sequence[Batch],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        progress: bool = True,
    ) -> None:
        self._parameters, self._batches = parameters, tuple(batches)
        self._device, self._dtype, self._progress = torch.device(device), dtype, progress
        # The buffers (rotary frequencies, embedding scales) are real: they are computed, not stored in checkpoints.
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(self._device)
        self.head = output_head(self.model)
        found = decoder_layers(self.model)
        self._prefix, self.layers = found if found is not None else ("", nn.ModuleList())
        self.stage_of = self._stages()
        self.hidden: list[Tensor] = []
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._as_output: Callable[[Tensor], Any] = lambda hidden: hidden

    def _stages(self) -> dict[str, int]:
        stages: dict[str, int] = {}
        after = False
        for name, module in self.model.named_modules():
            inside = bool(self._prefix) and name.startswith(f"{self._prefix}.")
            after = after or inside
            if is_linear(module) or name == self.head:
                own = int(name[len(self._prefix) + 1 :].split(".")[0]) + 1 if inside else None
                stages[name] = own if own is not None else (len(self.layers) + 1 if after else 0)
        return stages

    @property
    def layer_stages(self) -> range:
        """The stages that are a layer's."""
        return range(1, len(self.layers) + 1)

    def linears(self, stage: int) -> dict[str, nn.Module]:
        """The linears of a stage by name."""
        return {name: self.model.get_submodule(name) for name, own in self.stage_of.items() if own == stage}

    def name_in_layer(self, name: str) -> str:
        """What a module of a layer is called there.

        Args:
            name: canonical name of a module within a layer.
        """
        return name[len(self._prefix) + 1 :].partition(".")[2]

    def bar(self, what: str, batches: int | None = None) -> Iterator[int]:
        """The numbers of the first batches, all by default, on a progress bar."""
        count = len(self._batches) if batches is None else batches
        return iter(  # a bar is closed when its iterator ends
            tqdm(range(count), desc=f"Calibrating, {what}", unit="batch", leave=False, disable=not self._progress)
        )

    @torch.no_grad()
    def embed(
        self,
        observing: Callable[[int, Callable[[], bool]], AbstractContextManager[Any]] = lambda j, when: nullcontext(),
        batches: int | None = None,
    ) -> None:
        """Find out what the first layer is given, and how each layer is called.

        Args:
            batches: how many of the batches, from the first; all by default.
            observing: a context for each batch by its number; it is given a function that tells whether the layers
                are still to come.

        Raises:
            LayersNotApartError: layers cannot be run one by one.
            CompressionError: NaN or infinite weights; the tensor is named.
        """
        self.forget()
        # What comes before the layers is read once, not once a batch.
        with self.loaded(self.layers[0]), self.loaded_when_called():
            for j in self.bar("embedding", batches):
                current: list[Tensor] = []

                def enter(
                    i: int, args: tuple[Any, ...], kwargs: dict[str, Any], current: list[Tensor] = current
                ) -> Any:
                    hidden, args, kwargs = _taken_apart(args, kwargs)
                    if not current:
                        current.append(hidden)
                        if not self.hidden:
                            self._learn_output(hidden, args, kwargs)
                    if hidden is not current[0]:
                        raise LayersNotApartError(f"it changes the hidden states before layer {i}")
                    self._record(i, hidden, args, kwargs)
                    return self._as_output(hidden)

                with observing(j, partial(operator.not_, current)):
                    self._run_outside(j, enter)
                if not current:
                    raise LayersNotApartError("its forward pass does not call its layers")
                self.hidden.append(current[0])

    def _learn_output(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out whether layers return hidden states or a tuple that begins with them."""
        layer = self.layers[0]
        output = type(layer).forward(layer, hidden, *args, **kwargs)
        if isinstance(output, tuple):
            hidden_of(output, hidden)
            rest = output[1:]
            self._as_output = lambda hidden: (hidden, *rest)

    def _record(self, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a layer's arguments, one set for all batches of a shape; they must not depend on the tokens."""
        calls = self._calls.setdefault(tuple(hidden.shape), [])
        if len(calls) == i:
            if not _is_plain([*args, *kwargs.values()]):
                raise LayersNotApartError(f"layer {i} is given an object that layers may share")
            calls.append((args, kwargs))
        elif i > len(calls) or not _equal(calls[i], (args, kwargs)):
            raise LayersNotApartError(f"what layer {i} is given beside the hidden states depends on the tokens")

    def call(self, stage: int, j: int) -> _Call:
        """What the layer of a stage is given of a batch: hidden states, and arguments by place and by name."""
        hidden = self.hidden[j]
        return hidden, *self._calls[tuple(hidden.shape)][stage - 1]

    @torch.no_grad()
    def advance(self, stage: int, j: int) -> None:
        """Take a batch's hidden states through the layer of a stage, whose weights are loaded."""
        hidden, args, kwargs = self.call(stage, j)
        self.hidden[j] = hidden_of(self.layers[stage - 1](hidden, *args, **kwargs), hidden)

    def announce(self, stage: int) -> None:
        """Have the system fetch the weights of a stage's layer from the disk meanwhile, if it is one of a layer."""
        for name in self._parameters.modules:
            if name.startswith(f"{self._prefix}.{stage - 1}."):
                self._parameters.announce(name)

    def run_rest(
        self,
        batches: int | None = None,
        observing: Callable[[int, Callable[[], bool]], AbstractContextManager[Any]] = lambda j, when: nullcontext(),
    ) -> None:
        """Run what comes after the layers, without the head's own work.

        Args:
            batches: how many of the batches, from the first; all by default.
            observing: a context for each by its number; it is given a function that tells whether the layers are past.
        """
        with self.loaded_when_called():  # read once, not once a batch
            for j in self.bar("output head", batches):
                past: list[bool] = []
                with observing(j, partial(bool, past)):
                    self._run_outside(j, self._leave(self.hidden[j], past))

    def run_whole(self, j: int) -> None:
        """Run the whole model, whose weights are loaded, without the head's own work."""
        with ExitStack() as stack:
            self._forward(j, stack)

    def logits(self, j: int) -> Tensor:
        """The logits of a batch whose hidden states went through all layers (or of the whole model, if there are no
        layers apart), ``[rows, length, vocabulary]``; the weights of the rest, the head included, are loaded.
        """
        with ExitStack() as stack:
            if len(self.layers) and self.hidden:
                self._replace_layers(self._leave(self.hidden[j], []), stack)
            return self.model(input_ids=self._batches[j].ids.to(self._device), use_cache=False).logits  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop the hidden states."""
        self.hidden, self._calls = [], {}

    def _leave(self, hidden: Tensor, past: list[bool]) -> _Stub:
        """In the place of the layers: whatever they are given, the last one hands ``hidden`` on, and says so."""

        def leave(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if i == len(self.layers) - 1:
                past.append(True)
                return self._as_output(hidden)
            return self._as_output(_taken_apart(args, kwargs)[0])

        return leave

    def _run_outside(self, j: int, stub: _Stub) -> None:
        """Run the model with ``stub(i, args, kwargs)`` for the i-th layer, and without the head's own work."""
        with ExitStack() as stack:
            self._replace_layers(stub, stack)
            self._forward(j, stack)

    def _replace_layers(self, stub: _Stub, stack: ExitStack) -> None:
        for i, layer in enumerate(self.layers):
            stack.enter_context(_replaced_forward(layer, _as_forward(stub, i)))

    def _forward(self, j: int, stack: ExitStack) -> None:
        if self.head is not None:
            head = self.model.get_submodule(self.head)
            # Logits are the largest tensor of a forward pass, and nobody wants them here.
            stack.enter_context(_replaced_forward(head, lambda hidden, *_, **__: hidden[..., :1]))
        stack.enter_context(self.loaded_when_called())
        self.model(input_ids=self._batches[j].ids.to(self._device), use_cache=False)

    @contextmanager
    def loaded(self, root: nn.Module, dtype: torch.dtype | None = None, head: bool = False) -> Iterator[None]:
        """The weights of a module and all within on the device while the context lasts; the head's if wanted."""
        inside = set(root.modules())
        empty: dict[nn.Module, dict[str, Any]] = {}
        try:
            for name in self._parameters.modules:
                module = self.model.get_submodule(name)
                if module in inside and (head or name != self.head):
                    empty[module] = dict(module._parameters)
                    self.load(name, dtype)
            yield
        finally:
            for module, parameters in empty.items():
                module._parameters.update(parameters)

    @contextmanager
    def loaded_when_called(self, head: bool = False) -> Iterator[None]:
        """Modules outside the layers get their weights when they are called, and lose them with the context.

        What the text does not reach, such as a vision tower, is never loaded.
        """
        empty: dict[nn.Module, dict[str, Any]] = {}
        handles = []
        for name in self._parameters.modules:
            module = self.model.get_submodule(name)
            if (name == self.head and not head) or (self._prefix and name.startswith(f"{self._prefix}.")):
                continue

            def load(module: nn.Module, _: Any, name: str = name) -> None:
                if module not in empty and any(p is not None and p.is_meta for p in module._parameters.values()):
                    empty[module] = dict(module._parameters)
                    self.load(name)

            handles.append(module.register_forward_pre_hook(load))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters in empty.items():
                module._parameters.update(parameters)

    def load(self, name: str, dtype: torch.dtype | None = None) -> None:
        """Read a module's own parameters onto the device.

        Raises:
            CompressionError: NaN or infinite values; the tensor is named.
        """
        module = self.model.get_submodule(name)
        for key, value in self._parameters.of(name).items():
            value = value.to(self._device)
            # Told here, since a NaN in a norm shows itself in the moments of modules before it.
            if not all_finite(value):
                raise CompressionError(
                    f"{name}.{key} of the expert holds NaN or infinite values; compress an intact checkpoint."
                )
            module._parameters[key] = nn.Parameter(value.to(dtype or self._dtype), requires_grad=False)


def hidden_of(output: Any, given: Tensor) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple of nothing else.

    Args:
        output: what the layer returned.
        given: the hidden states that it was given.

    Raises:
        LayersNotApartError: it returned more, or something else.
    """
    first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    if not isinstance(first, Tensor) or first.shape != given.shape or any(item is not None for item in rest):
        raise LayersNotApartError("its layers return more than hidden states")
    return first


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _as_forward(stub: _Stub, i: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: stub(i, args, kwargs)


def _taken_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A layer's hidden states and its other arguments."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise LayersNotApartError("its layers take no hidden states")
    return hidden, args[1:], rest


def _is_plain(value: Any) -> bool:
    """Whether nothing can be handed from layer to layer in an argument, as in a cache."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) if not isinstance(one, Tensor) and not isinstance(other, Tensor) else False
