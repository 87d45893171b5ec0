"""How far base + delta is from the expert on text that it was not fitted to, with one layer of each in memory."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from ..errors import CompressionError
from ..verification.fidelity import Fidelity
from .batches import CalibrationBatches
from .layerwise import LayerwiseMoments
from .sources import Parameters

__all__ = ["HELD_OUT_EVERY", "HELD_OUT_TOKENS", "HeldOutDivergence"]

#: One calibration sequence of so many is kept apart.
HELD_OUT_EVERY = 4
#: Tokens whose logits are in memory at once: 512 × vocabulary numbers of both models, or one sequence's.
HELD_OUT_TOKENS = 512


class HeldOutDivergence:
    """KL(expert ‖ model) a token on a text, for one model after the other; the expert's layers run once.

    Memory on the device: the hidden states of the text for both, the weights of one decoder layer, and in the end
    the weights outside the layers and the logits of 512 tokens, of both. A model whose layers cannot be told apart is
    loaded whole, twice.

    Args:
        config: of the causal LM of both.
        expert: its parameters.
        text: the token ids, see :func:`~.batches.hold_out`.
        device: where to run.
        dtype: dtype to run in; divergences are worked out in float32.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        expert: Parameters,
        text: CalibrationBatches,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        progress: bool = True,
    ) -> None:
        self._config, self._text = config, text
        self._device, self._dtype, self._progress = device, dtype, progress
        self._expert = self._run(expert)

    @property
    def tokens(self) -> int:
        """How many predictions are compared: one for each token of the text that has another after it."""
        return sum(int((batch.lengths - 1).sum()) for batch in self._text.batches)

    def measure(self, model: Parameters) -> float:
        """Mean KL(expert ‖ model) a token, nats.

        Raises:
            CompressionError: logits that are not numbers.
        """
        fidelity = Fidelity()
        streams = zip(self._text.batches, self._expert.predictions(), self._run(model).predictions(), strict=True)
        for batch, of_expert, of_model in streams:
            for row, length in enumerate(batch.lengths.tolist()):
                # The last token of a sequence is followed by none; what is predicted there counts for nothing.
                part = (row, slice(0, length - 1))
                fidelity.add(of_expert[part], of_model[part], batch.ids[row, 1:length])
        if math.isnan(fidelity.kl):
            raise CompressionError(
                f"The expert or its delta gives logits that are not numbers in {self._dtype} on the calibration text, "
                "so max_kl cannot be measured. Calibrate on other text, or give target_bits or target_size."
            )
        return fidelity.mean_kl

    def _run(self, parameters: Parameters) -> LayerwiseMoments:
        return LayerwiseMoments(
            self._config,
            parameters,
            self._text,
            device=self._device,
            dtype=self._dtype,
            progress=self._progress,
        )
