"""Second moments of every linear's inputs, with the weights of one decoder layer in memory at a time.

Memory on the device: the weights of one layer; the hidden states, ``tokens * hidden_size`` elements, padding included;
the activations of one batch of 4096 tokens; and the moments of one layer, float32. For Mistral-7B (hidden size 4096,
intermediate size 14336) in bfloat16 with 65,536 tokens: 0.44 GB of weights, 0.54 GB of hidden states (up to 1.07 GB
with padding) and 1.02 GB of moments. Fitting a linear to its moments takes more than all of this, see
:mod:`.compensation`. Where the damage of errors is measured, the layer's weights in float32 (0.87 GB) stay beside the
moments while modules are fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .batches import Batch, CalibrationBatches
from .damage import LayerDamage, in_float32
from .layered_model import LayeredModel, LayersNotApartError, hidden_of
from .moments import MomentCollector
from .sources import Parameters

__all__ = ["LayerwiseMoments", "SecondMoments"]

logger = logging.getLogger(__name__)


class SecondMoments(Protocol):
    """Where the second moments of linears come from; a plain dictionary is one."""

    def get(self, name: str, /) -> Tensor | None:
        """``E[x xᵀ]`` of the inputs of a linear or of the output head, by canonical name.

        Returns:
            float32 ``[in, in]``; `None` if the text does not reach the module.
        """


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
        self._batches, self._collected = (*calibration.batches, *probe), len(calibration.batches)
        self._run = LayeredModel(config, parameters, self._batches, device=device, dtype=dtype, progress=progress)
        self._held: dict[str, Tensor] = {}
        self._whole = self._whole_collected = False
        #: What the layer of the stage was given of the probe, and, once it was asked for, the damage measured on it.
        self._probe: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self._damage: LayerDamage | None = None
        self._while_probed = ExitStack()
        self._stage = -1
        if not len(self._run.layers):
            self._give_up_layers("it has no list of alike decoder layers")

    def get(self, name: str, /) -> Tensor | None:
        """See :meth:`SecondMoments.get`.

        Raises:
            CompressionError: NaN or infinite weights; the tensor is named.
            ValueError: an earlier layer than that of the call before.
        """
        stage = self._run.stage_of.get(name)
        if stage is None or self._whole:
            return self._of_whole(name)
        if stage < self._stage:
            raise ValueError(f"{name} is asked for after a later layer; ask in the order of the model's modules.")
        try:
            while self._stage < stage:
                self._held = {}  # before the next layer needs the memory
                self._held = self._advance(collect=self._stage + 1 == stage)
        except LayersNotApartError as reason:
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
        elsewhere = self._run.stage_of.get(name) != self._stage or self._stage not in self._run.layer_stages
        if self._whole or not self._probe or elsewhere:
            return None
        if self._damage is None:
            layer = self._run.layers[self._stage - 1]
            self._while_probed.enter_context(self._run.loaded(layer, torch.float32))
            probe = self._probe

            def run(i: int) -> Tensor:
                hidden, args, kwargs = in_float32(probe[i])
                return hidden_of(layer(hidden, *args, **kwargs), hidden)

            self._damage = LayerDamage(run, [batch.real for batch in self._batches[self._collected :]])
        return self._damage.of(self._run.model.get_submodule(name), error)

    @torch.no_grad()
    def predictions(self) -> Iterator[Tensor]:
        """The model's logits for each batch of the calibration text, ``[rows, length, vocabulary]``.

        May be asked for again; no moments can be had afterwards. One batch of logits is in memory at a time, beside
        the weights outside the layers.

        Raises:
            CompressionError: as :meth:`get`.
        """
        run = self._run
        try:
            while not self._whole and self._stage < len(run.layers):
                self._held = {}
                self._advance(collect=False)
        except LayersNotApartError as reason:
            self._give_up_layers(str(reason))
        with run.loaded(run.model, head=True) if self._whole else run.loaded_when_called(head=True):
            for j in run.bar("predictions", self._collected):
                yield run.logits(j)

    @torch.no_grad()
    def _advance(self, collect: bool) -> dict[str, Tensor]:
        """Go one stage further; its moments, if they are to be collected."""
        self._stage += 1
        self._while_probed.close()
        self._probe, self._damage = [], None
        run, real = self._run, [batch.real for batch in self._batches]
        collector = MomentCollector(run.linears(self._stage) if collect else {})
        if self._stage == 0:
            run.embed(lambda j, when: collector.collecting(real[j], when) if j < self._collected else nullcontext())
        elif self._stage in run.layer_stages:
            self._run_layer(collector)
        elif collect:
            run.run_rest(self._collected, lambda j, when: collector.collecting(real[j], when))
        return collector.means()

    def _run_layer(self, collector: MomentCollector) -> None:
        run = self._run
        with run.loaded(run.layers[self._stage - 1]):
            run.announce(self._stage + 1)  # the disk has until the moments of this layer are used up
            for j in run.bar(f"layer {self._stage} of {len(run.layers)}"):
                of_probe = j >= self._collected
                if of_probe:
                    self._probe.append(run.call(self._stage, j))
                with nullcontext() if of_probe else collector.collecting(self._batches[j].real):
                    run.advance(self._stage, j)

    def _give_up_layers(self, reason: str) -> None:
        """From now on the model is run whole."""
        logger.warning(
            "%s is loaded whole for calibration, since %s; the memory needed is the model and all its moments.",
            type(self._run.model).__name__,
            reason,
        )
        self._whole, self._probe, self._held = True, [], {}
        self._run.forget()

    @torch.no_grad()
    def _of_whole(self, name: str) -> Tensor | None:
        """A moment, those of all linears being formed at once in a model that is run whole."""
        if self._whole and not self._whole_collected:
            self._whole_collected = True
            run = self._run
            collector = MomentCollector({name: run.model.get_submodule(name) for name in run.stage_of})
            with run.loaded(run.model):
                for j in run.bar("the whole model", self._collected):
                    with collector.collecting(self._batches[j].real):
                        run.run_whole(j)
            self._held = collector.means()
        return self._held.get(name)
