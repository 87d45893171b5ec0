"""Statistics of linears' inputs in the model that is being compressed, beside the expert's: layer after layer.

Two models go through the calibration text side by side, one decoder layer in memory of each: the expert, and what
has become of it so far (:mod:`.partly_compressed`). When a linear is asked for, both run from the layer's input to
that linear, with what was compressed of the layer before it in place, and :mod:`.drift` says what it can make up for.

Both run in float32, on a GPU with products in TF32: what is looked at are differences of the two, which drown in the
rounding of bfloat16. A layer is run in part for each of the inputs that its linears have (query, key and value share
one), which comes to some four runs of each model; only the batch at hand is in memory beside the hidden states.

Memory on the device, for Mistral-7B with 65,536 tokens: 1.74 GB of weights of two layers, 2.15 GB of hidden states of
two models (up to twice that with padding), and at most 1.88 GB of statistics of one linear (``C``, ``D`` and ``R`` of
an input of 14336 channels).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..delta_format.spec import ModuleRecord
from .batches import CalibrationBatches
from .drift import Drift
from .layered_model import LayeredModel, LayersNotApartError
from .layerwise import LayerwiseMoments
from .moments import MomentCollector, tensor_cores
from .partly_compressed import PartlyCompressed
from .residual_stream import LayerWiring, wiring_of
from .sources import Parameters

__all__ = ["SequentialStatistics"]

logger = logging.getLogger(__name__)


class SequentialStatistics:
    """Second moments of linears' inputs as they are in the compressed model, and how far these are from the expert's.

    It is the :class:`~.layerwise.SecondMoments` and the :class:`~.driver.Drifts` of
    :func:`~.driver.compress_modules`.
    Ask in the order of :meth:`order`. Where the layers' wiring does not allow for corrections (see
    :func:`~.residual_stream.wiring_of`), moments are the expert's own, as :class:`~.layerwise.LayerwiseMoments` forms
    them, and no drift is known.

    Args:
        config: of the causal LM.
        expert: the expert's parameters.
        compressed: those of the model that is being made.
        calibration: the token ids to run.
        device: where to run.
        dtype: dtype in which the expert runs where there are no corrections.
        progress: whether to show a progress bar for each layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        expert: Parameters,
        compressed: PartlyCompressed,
        calibration: CalibrationBatches,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        progress: bool = True,
    ) -> None:
        self._fit_alone = partial(
            LayerwiseMoments, config, expert, calibration, device=device, dtype=dtype, progress=progress
        )
        self._parameters, self._real = compressed, [batch.real for batch in calibration.batches]
        run: dict[str, Any] = {"device": device, "dtype": torch.float32, "progress": progress}
        self._expert = LayeredModel(config, expert, calibration.batches, **run)
        self._compressed = LayeredModel(config, compressed, calibration.batches, **run)
        self._stage = -1
        self._loaded = ExitStack()
        self._wiring: LayerWiring | None = None
        self._held: dict[str, Tensor] = {}
        self._drifts: dict[str, Drift] = {}
        self._alone: LayerwiseMoments | None = None
        self._call_order = self._scouted()
        if not self._call_order:
            self._give_up()

    def _scouted(self) -> list[str]:
        """The linears of the first layer in the order of their calls; none where there is no stream to follow."""
        run = self._expert
        if not len(run.layers):
            return []
        try:
            run.embed(batches=1)
            with run.loaded(run.layers[0]), tensor_cores():
                wiring = wiring_of(run.layers[0], run.linears(1), *run.call(1, 0))
        except LayersNotApartError:
            return []
        return [] if wiring is None else [name for group in wiring.groups for name in group]

    def order(self, names: Sequence[str], /) -> list[str]:
        """Modules in the order in which to compress them: the linears of a layer as they are called.

        Args:
            names: canonical names in the order in which the model names them.
        """
        run = self._expert
        rank = {run.name_in_layer(name): i for i, name in enumerate(self._call_order)}
        ordered = list(names)
        for stage in self._expert.layer_stages:
            places = [i for i, name in enumerate(names) if run.stage_of.get(name) == stage]
            called = sorted((names[i] for i in places), key=lambda name: rank.get(run.name_in_layer(name), len(rank)))
            for i, name in zip(places, called, strict=True):
                ordered[i] = name
        return ordered

    def get(self, name: str, /) -> Tensor | None:
        """``E[x̃ x̃ᵀ]`` of the inputs of a linear or of the output head, float32 ``[in, in]``.

        Raises:
            CompressionError: NaN or infinite weights; the tensor is named.
            ValueError: an earlier layer than that of the call before.
        """
        if self._alone is not None:
            return self._alone.get(name)
        stage = self._expert.stage_of.get(name)
        if stage is None:
            return None
        if stage < self._stage:
            raise ValueError(f"{name} is asked for after a later layer; ask in the order of the model's layers.")
        try:
            while self._stage < stage:
                self._leave()
                self._enter(asked=self._stage + 1 == stage)
        except LayersNotApartError:
            self._give_up()
            return self.get(name)
        if self._wiring is not None and name not in self._held:
            self._collect(self._wiring.group_of(name))
        return self._held.get(name)

    def drift(self, name: str) -> Drift | None:
        """Of the inputs of a linear that :meth:`get` was last asked about; `None` where it is not corrected for."""
        return self._drifts.get(name)

    def settle(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """From now on a module runs as its delta has it.

        Args:
            name: canonical module name.
            record: its record.
            leaves: its tensors by leaf name.
        """
        if self._alone is not None:
            return
        self._parameters.settle(name, record, leaves)
        if self._expert.stage_of.get(name) == self._stage and self._stage in self._expert.layer_stages:
            self._compressed.load(name)

    @property
    def _both(self) -> tuple[LayeredModel, LayeredModel]:
        return self._expert, self._compressed

    def _leave(self) -> None:
        """Take all hidden states through the layer of the stage."""
        self._held, self._drifts, self._wiring = {}, {}, None
        if self._stage in self._expert.layer_stages:
            self._compressed.announce(self._stage + 1)  # of the expert, too
            with tensor_cores():
                for j in self._expert.bar(f"layer {self._stage} of {len(self._expert.layers)}"):
                    for run in self._both:
                        run.advance(self._stage, j)
        self._loaded.close()
        if self._stage >= 0:
            self._parameters.release()

    @torch.no_grad()
    def _enter(self, asked: bool) -> None:
        self._stage += 1
        collector = MomentCollector(self._expert.linears(self._stage) if asked else {})
        with tensor_cores():
            if self._stage == 0:
                self._expert.embed(lambda j, when: collector.collecting(self._real[j], when))
                self._compressed.embed()
            elif self._stage in self._expert.layer_stages:
                self._enter_layer(asked)
                return
            elif asked:
                self._expert.run_rest(observing=lambda j, when: collector.collecting(self._real[j], when))
        self._held = collector.means()

    def _enter_layer(self, asked: bool) -> None:
        for run in self._both:
            self._loaded.enter_context(run.loaded(run.layers[self._stage - 1]))
        linears = self._expert.linears(self._stage)
        if not asked:
            return
        # Looked for in each layer: in some models, they alternate.
        self._wiring = wiring_of(self._expert.layers[self._stage - 1], linears, *self._expert.call(self._stage, 0))
        if self._wiring is None:
            collector = MomentCollector(linears)
            for j in self._expert.bar(f"layer {self._stage} of {len(self._expert.layers)}"):
                with collector.collecting(self._real[j]):
                    hidden, args, kwargs = self._expert.call(self._stage, j)
                    self._expert.layers[self._stage - 1](hidden, *args, **kwargs)
            self._held = collector.means()

    @torch.no_grad()
    def _collect(self, group: list[str]) -> None:
        """The statistics of the linears that share one input."""
        assert self._wiring is not None
        self._held, self._drifts = {}, {}  # before the next need the memory
        writer = next((name for name in group if name in self._wiring.writers), None)
        before = [] if writer is None else self._wiring.written_before(writer)
        second = inputs = residual = None
        count = 0
        with tensor_cores():
            for j in self._expert.bar(f"layer {self._stage} of {len(self._expert.layers)}, {group[0]}"):
                kept = self._real[j].reshape(-1)
                (x, r), (own_x, own_r) = (self._run_to(run, group[0], before, j, kept) for run in self._both)
                if second is None:
                    second, inputs = (own_x.new_zeros(x.shape[1], x.shape[1]) for _ in range(2))
                    residual = None if writer is None else own_x.new_zeros(r.shape[1], x.shape[1])
                assert inputs is not None
                second.addmm_(own_x.T, own_x)
                inputs.addmm_((x - own_x).T, own_x)
                if residual is not None:
                    residual.addmm_((r - own_r).T, own_x)
                count += len(x)
        assert second is not None
        assert inputs is not None
        for total in (second, inputs, residual):
            if total is not None:
                total.div_(count)
        self._held = dict.fromkeys(group, second)
        self._drifts = {name: Drift(count, inputs, residual if name == writer else None) for name in group}

    def _run_to(self, run: LayeredModel, name: str, before: list[str], j: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What a linear is given of a batch, and the stream that its output is added to: float32 ``[tokens, …]``.

        Args:
            run: whose layer to run, as far as that linear.
            name: the linear.
            before: linears whose outputs were added to the stream by then.
            j: number of the batch.
            kept: bool ``[rows * length]``, the positions that count.
        """
        hidden, args, kwargs = run.call(self._stage, j)
        stream = hidden
        linear = run.model.get_submodule(name)
        with ExitStack() as stack, _stopping_at(linear) as given:
            for module in map(run.model.get_submodule, before):

                def add(_: nn.Module, __: Any, output: Tensor) -> None:
                    nonlocal stream
                    stream = stream + output

                stack.callback(module.register_forward_hook(add).remove)
            run.layers[self._stage - 1](hidden, *args, **kwargs)
        kept = kept.to(hidden.device)
        return tuple(tensor.flatten(0, -2)[kept] for tensor in (given[0], stream))  # type: ignore[return-value]

    def _give_up(self) -> None:
        """From now on as if there were no drift."""
        logger.info("Errors of %s's layers are not made up for by the next.", type(self._expert.model).__name__)
        self._loaded.close()
        self._alone = self._fit_alone()
        self._held, self._drifts = {}, {}
        for run in self._both:
            run.forget()


class _Reached(Exception):
    """A forward pass came to where it was to end."""


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """A forward pass ends at the call of a module, whose input is in the list given."""
    given: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield given
    except _Reached as reached:
        # Frames and exceptions may refer to each other, and would keep all activations until a garbage collection.
        traceback.clear_frames(reached.__traceback__)
        reached.__traceback__ = None
    finally:
        handle.remove()
