"""Second moments of every linear's inputs, with the weights of one decoder layer in memory at a time.

The calibration tokens go through the embedding once; from then on only their hidden states are kept, one set for the
whole model, and moved from layer to layer. What a decoder layer is given beside the hidden states (masks, position
embeddings) does not depend on them, so it is recorded in that first pass, in which every layer is replaced by one that
hands its input on.

Memory on the device: the weights of one layer; the hidden states, ``tokens * hidden_size`` elements, padding included;
the activations of one batch of 4096 tokens; and the moments of one layer, float32. For Mistral-7B (hidden size 4096,
intermediate size 14336) in bfloat16 with 65,536 tokens: 0.44 GB of weights, 0.54 GB of hidden states (up to 1.07 GB
with padding) and 1.02 GB of moments. Fitting a linear to its moments takes more than all of this, see
:mod:`.compensation`. Where the damage of errors is measured, the layer's weights in float32 (0.87 GB) stay beside the
moments while modules are fitted.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CompressionError
from ..module_kinds import is_linear
from .batches import Batch, CalibrationBatches
from .damage import LayerDamage, in_float32
from .finite import all_finite
from .moments import MomentCollector
from .sources import Parameters, output_head

__all__ = ["LayerwiseMoments", "SecondMoments", "decoder_layers"]

logger = logging.getLogger(__name__)

#: What runs in the place of a layer: its number from 0, and what it is given.
_Stub = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


class SecondMoments(Protocol):
    """Where the second moments of linears come from; a plain dictionary is one."""

    def get(self, name: str, /) -> Tensor | None:
        """``E[x xᵀ]`` of the inputs of a linear or of the output head, by canonical name.

        Returns:
            float32 ``[in, in]``; `None` if the text does not reach the module.
        """


class _LayersNotApartError(Exception):
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


class LayerwiseMoments:
    """Second moments of a model's linears, worked out when they are asked for; see :class:`SecondMoments`.

    Ask in the order in which the model names its modules: layers go by once. Layers that nobody asks about are run,
    but their moments are not formed. A model whose layers cannot be told apart is loaded whole, and the log says so.

    Args:
        config: of the causal LM.
        parameters: its weights.
        calibration: the token ids to run.
        probe: further token ids to run, of which no moments are formed: those that :meth:`damage` is measured on.
        device: where to run.
        dtype: dtype to run in; the moments are float32 regardless.
        progress: whether to show a progress bar for each layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        parameters: Parameters,
        calibration: CalibrationBatches,
        *,
        probe: tuple[Batch, ...] = (),
        device: torch.device | str,
        dtype: torch.dtype,
        progress: bool = True,
    ) -> None:
        self._device, self._dtype, self._progress = torch.device(device), dtype, progress
        self._parameters = parameters
        self._batches, self._collected = (*calibration.batches, *probe), len(calibration.batches)
        # The buffers (rotary frequencies, embedding scales) are real: they are computed, not stored in checkpoints.
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(self._device)
        self._head = output_head(self._model)
        self._held: dict[str, Tensor] = {}
        self._whole = self._whole_collected = False
        #: What the layer of the stage was given of the probe, and, once it was asked for, the damage measured on it.
        self._probe: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self._damage: LayerDamage | None = None
        self._while_probed = ExitStack()
        #: Stages: 0 is what comes before the layers, i the i-th layer from 1, the last what comes after.
        self._stage = -1
        self._hidden: list[Tensor] = []
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._as_output: Callable[[Tensor], Any] = lambda hidden: hidden
        found = decoder_layers(self._model)
        self._prefix, self._layers = found if found is not None else ("", nn.ModuleList())
        self._stage_of = self._stages()
        if found is None:
            self._give_up_layers("it has no list of alike decoder layers")

    def get(self, name: str, /) -> Tensor | None:
        """See :meth:`SecondMoments.get`.

        Raises:
            CompressionError: NaN or infinite weights; the tensor is named.
            ValueError: an earlier layer than that of the call before.
        """
        stage = self._stage_of.get(name)
        if stage is None or self._whole:
            return self._of_whole(name)
        if stage < self._stage:
            raise ValueError(f"{name} is asked for after a later layer; ask in the order of the model's modules.")
        try:
            while self._stage < stage:
                self._held = {}  # before the next layer needs the memory
                self._held = self._advance(collect=self._stage + 1 == stage)
        except _LayersNotApartError as reason:
            self._give_up_layers(str(reason))
        return self._of_whole(name) if self._whole else self._held.get(name)

    def damage(self, name: str, error: Tensor) -> float | None:
        """What an error of one linear does to the output of its decoder layer: mean of ``‖h' − h‖² / ‖h‖²``.

        The layer runs on the probe once a call, in float32; its other weights are the expert's.

        Args:
            name: a linear of the layer that :meth:`get` was last asked about.
            error: float32 ``[out, in]``, what is added to the expert's weight.

        Returns:
            `None` without a probe, for a linear outside the layers, and where the model is run whole.
        """
        layers = range(1, len(self._layers) + 1)
        if self._whole or not self._probe or self._stage_of.get(name) != self._stage or self._stage not in layers:
            return None
        if self._damage is None:
            layer = self._layers[self._stage - 1]
            self._while_probed.enter_context(self._loaded(layer, torch.float32))
            probe = self._probe

            def run(i: int) -> Tensor:
                hidden, args, kwargs = in_float32(probe[i])
                return _hidden_of(layer(hidden, *args, **kwargs), hidden)

            self._damage = LayerDamage(run, [batch.real for batch in self._batches[self._collected :]])
        return self._damage.of(self._model.get_submodule(name), error)

    @torch.no_grad()
    def predictions(self) -> Iterator[Tensor]:
        """The model's logits for each batch of the calibration text, ``[rows, length, vocabulary]``.

        May be asked for again; no moments can be had afterwards. One batch of logits is in memory at a time, beside
        the weights outside the layers.

        Raises:
            CompressionError: as :meth:`get`.
        """
        try:
            while not self._whole and self._stage < len(self._layers):
                self._held = {}
                self._advance(collect=False)
        except _LayersNotApartError as reason:
            self._give_up_layers(str(reason))
        with self._loaded(self._model, head=True) if self._whole else self._loaded_when_called(head=True):
            for j, batch in enumerate(self._bar(self._batches[: self._collected], "predictions")):
                with ExitStack() as stack:
                    if not self._whole:
                        self._replace_layers(self._leave(self._hidden[j], []), stack)
                    logits = self._model(input_ids=batch.ids.to(self._device), use_cache=False).logits
                yield logits

    def _stages(self) -> dict[str, int]:
        stages: dict[str, int] = {}
        after = False
        for name, module in self._model.named_modules():
            inside = bool(self._prefix) and name.startswith(f"{self._prefix}.")
            after = after or inside
            if is_linear(module) or name == self._head:
                own = int(name[len(self._prefix) + 1 :].split(".")[0]) + 1 if inside else None
                stages[name] = own if own is not None else (len(self._layers) + 1 if after else 0)
        return stages

    def _named(self, stage: int) -> dict[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name, own in self._stage_of.items() if own == stage}

    @torch.no_grad()
    def _advance(self, collect: bool) -> dict[str, Tensor]:
        """Go one stage further; its moments, if they are to be collected."""
        self._stage += 1
        self._while_probed.close()
        self._probe, self._damage = [], None
        collector = MomentCollector(self._named(self._stage) if collect else {})
        if self._stage == 0:
            self._embed(collector)
        elif self._stage <= len(self._layers):
            self._run_layer(self._layers[self._stage - 1], collector)
        elif collect:
            self._run_rest(collector)
        return collector.means()

    def _embed(self, collector: MomentCollector) -> None:
        """Fill ``_hidden`` and ``_calls``: what the first layer is given, and how each layer is called."""
        # What comes before the layers is read once, not once a batch.
        with self._loaded(self._layers[0]), self._loaded_when_called():
            for j, batch in enumerate(self._bar(self._batches, "embedding")):
                current: list[Tensor] = []

                def enter(
                    i: int, args: tuple[Any, ...], kwargs: dict[str, Any], current: list[Tensor] = current
                ) -> Any:
                    hidden, args, kwargs = _taken_apart(args, kwargs)
                    if not current:
                        current.append(hidden)
                        if not self._hidden:
                            self._learn_output(hidden, args, kwargs)
                    if hidden is not current[0]:
                        raise _LayersNotApartError(f"it changes the hidden states before layer {i}")
                    self._record(i, hidden, args, kwargs)
                    return self._as_output(hidden)

                self._run_outside(batch, enter, self._if_collected(j, collector), partial(operator.not_, current))
                if not current:
                    raise _LayersNotApartError("its forward pass does not call its layers")
                self._hidden.append(current[0])

    def _learn_output(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out whether layers return hidden states or a tuple that begins with them."""
        layer = self._layers[0]
        output = type(layer).forward(layer, hidden, *args, **kwargs)
        if isinstance(output, tuple):
            _hidden_of(output, hidden)
            rest = output[1:]
            self._as_output = lambda hidden: (hidden, *rest)

    def _record(self, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a layer's arguments, one set for all batches of a shape; they must not depend on the tokens."""
        calls = self._calls.setdefault(tuple(hidden.shape), [])
        if len(calls) == i:
            if not _is_plain([*args, *kwargs.values()]):
                raise _LayersNotApartError(f"layer {i} is given an object that layers may share")
            calls.append((args, kwargs))
        elif i > len(calls) or not _equal(calls[i], (args, kwargs)):
            raise _LayersNotApartError(f"what layer {i} is given beside the hidden states depends on the tokens")

    def _run_layer(self, layer: nn.Module, collector: MomentCollector) -> None:
        with self._loaded(layer):
            if self._stage < len(self._layers):
                # The disk has until the moments of this layer are used up.
                for name in self._parameters.modules:
                    if name.startswith(f"{self._prefix}.{self._stage}."):
                        self._parameters.announce(name)
            for j, batch in enumerate(self._bar(self._batches, f"layer {self._stage} of {len(self._layers)}")):
                hidden = self._hidden[j]
                args, kwargs = self._calls[tuple(hidden.shape)][self._stage - 1]
                if j >= self._collected:
                    self._probe.append((hidden, args, kwargs))
                with self._if_collected(j, collector).collecting(batch.real):
                    self._hidden[j] = _hidden_of(layer(hidden, *args, **kwargs), hidden)

    def _if_collected(self, j: int, collector: MomentCollector) -> MomentCollector:
        """The collector, or one of nothing for a batch of the probe."""
        return collector if j < self._collected else MomentCollector({})

    def _run_rest(self, collector: MomentCollector) -> None:
        """Run what comes after the layers, the output head's inputs included."""
        for j, batch in enumerate(self._bar(self._batches[: self._collected], "output head")):
            past: list[bool] = []
            self._run_outside(batch, self._leave(self._hidden[j], past), collector, when=partial(bool, past))

    def _leave(self, hidden: Tensor, past: list[bool]) -> _Stub:
        """In the place of the layers: whatever they are given, the last one hands ``hidden`` on, and says so."""

        def leave(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if i == len(self._layers) - 1:
                past.append(True)
                return self._as_output(hidden)
            return self._as_output(_taken_apart(args, kwargs)[0])

        return leave

    def _run_outside(
        self,
        batch: Batch,
        stub: _Stub,
        collector: MomentCollector,
        when: Callable[[], bool],
    ) -> None:
        """Run the model with ``stub(i, args, kwargs)`` for the i-th layer, and without the head's own work."""
        with ExitStack() as stack:
            self._replace_layers(stub, stack)
            self._forward(batch, collector, stack, when)

    def _replace_layers(self, stub: _Stub, stack: ExitStack) -> None:
        for i, layer in enumerate(self._layers):
            stack.enter_context(_replaced_forward(layer, _as_forward(stub, i)))

    def _forward(
        self, batch: Batch, collector: MomentCollector, stack: ExitStack, when: Callable[[], bool] = lambda: True
    ) -> None:
        if self._head is not None:
            head = self._model.get_submodule(self._head)
            # Logits are the largest tensor of a forward pass, and nobody wants them here.
            stack.enter_context(_replaced_forward(head, lambda hidden, *_, **__: hidden[..., :1]))
        stack.enter_context(self._loaded_when_called())
        stack.enter_context(collector.collecting(batch.real, when))
        self._model(input_ids=batch.ids.to(self._device), use_cache=False)

    def _give_up_layers(self, reason: str) -> None:
        """From now on the model is run whole."""
        logger.warning(
            "%s is loaded whole for calibration, since %s; the memory needed is the model and all its moments.",
            type(self._model).__name__,
            reason,
        )
        self._whole, self._hidden, self._calls, self._probe, self._held = True, [], {}, [], {}

    @torch.no_grad()
    def _of_whole(self, name: str) -> Tensor | None:
        """A moment, those of all linears being formed at once in a model that is run whole."""
        if self._whole and not self._whole_collected:
            self._whole_collected = True
            collector = MomentCollector({name: self._model.get_submodule(name) for name in self._stage_of})
            with self._loaded(self._model):
                for batch in self._bar(self._batches[: self._collected], "the whole model"):
                    with ExitStack() as stack:
                        self._forward(batch, collector, stack)
            self._held = collector.means()
        return self._held.get(name)

    @contextmanager
    def _loaded(self, root: nn.Module, dtype: torch.dtype | None = None, head: bool = False) -> Iterator[None]:
        """The weights of a module and all within on the device while the context lasts; the head's if wanted."""
        inside = set(root.modules())
        empty: dict[nn.Module, dict[str, Any]] = {}
        try:
            for name in self._parameters.modules:
                module = self._model.get_submodule(name)
                if module in inside and (head or name != self._head):
                    empty[module] = dict(module._parameters)
                    self._load(name, module, dtype)
            yield
        finally:
            for module, parameters in empty.items():
                module._parameters.update(parameters)

    @contextmanager
    def _loaded_when_called(self, head: bool = False) -> Iterator[None]:
        """Modules outside the layers get their weights when they are called, and lose them with the context.

        What the text does not reach, such as a vision tower, is never loaded.
        """
        empty: dict[nn.Module, dict[str, Any]] = {}
        handles = []
        for name in self._parameters.modules:
            module = self._model.get_submodule(name)
            if (name == self._head and not head) or (self._prefix and name.startswith(f"{self._prefix}.")):
                continue

            def load(module: nn.Module, _: Any, name: str = name) -> None:
                if module not in empty and any(p is not None and p.is_meta for p in module._parameters.values()):
                    empty[module] = dict(module._parameters)
                    self._load(name, module)

            handles.append(module.register_forward_pre_hook(load))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters in empty.items():
                module._parameters.update(parameters)

    def _load(self, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        for key, value in self._parameters.of(name).items():
            value = value.to(self._device)
            # Told here, since a NaN in a norm shows itself in the moments of modules before it.
            if not all_finite(value):
                raise CompressionError(
                    f"{name}.{key} of the expert holds NaN or infinite values; compress an intact checkpoint."
                )
            module._parameters[key] = nn.Parameter(value.to(dtype or self._dtype), requires_grad=False)

    def _bar(self, batches: tuple[Batch, ...], what: str) -> Any:
        return tqdm(batches, desc=f"Calibrating, {what}", unit="batch", leave=False, disable=not self._progress)


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
        raise _LayersNotApartError("its layers take no hidden states")
    return hidden, args[1:], rest


def _hidden_of(output: Any, given: Tensor) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple of nothing else."""
    first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    if not isinstance(first, Tensor) or first.shape != given.shape or any(item is not None for item in rest):
        raise _LayersNotApartError("its layers return more than hidden states")
    return first


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
