"""Every error this package raises on purpose, so that a caller can tell them apart.

All of them derive from :class:`MESwitchError`, and each also from the built-in exception that transformers or PEFT
raise in the same situation (``ValueError`` almost everywhere), so code written against those libraries keeps working.
"""

from __future__ import annotations

__all__ = [
    "BaseMismatchError",
    "BitDeltaError",
    "BudgetError",
    "CheckpointError",
    "CompressionError",
    "DeltaFormatError",
    "DistillationError",
    "ExpertNameError",
    "ExpertNotFoundError",
    "FormatVersionError",
    "MESwitchError",
    "MissingDependencyError",
    "OutputFolderError",
    "RouterError",
    "UnsupportedModelError",
    "UnsupportedOperationError",
    "VerificationError",
    "VocabularyError",
]


class MESwitchError(Exception):
    """Base class of all errors raised by transformers_meswitch."""


class DeltaFormatError(MESwitchError, ValueError):
    """A delta repo is malformed: missing, truncated, of a wrong shape or dtype, or with values out of range."""


class FormatVersionError(DeltaFormatError):
    """A delta was written in a format version that this release cannot read."""


class CheckpointError(MESwitchError, ValueError):
    """A base or fine-tune checkpoint has no readable safetensors: absent, truncated, or only pickles."""


class OutputFolderError(MESwitchError, ValueError):
    """A folder cannot take what is to be saved: it holds a full model, or somebody else is writing into it."""


class BaseMismatchError(MESwitchError, ValueError):
    """A delta was formed against another base than the one that is loaded."""


class ExpertNotFoundError(MESwitchError, ValueError):
    """An expert was named that is not loaded."""


class ExpertNameError(MESwitchError, ValueError):
    """An expert name is taken, reserved, or would collide with a module of the model."""


class UnsupportedModelError(MESwitchError, ValueError):
    """The model has a layer that cannot be expressed as a delta (fused mixture-of-experts weights, for example)."""


class UnsupportedOperationError(MESwitchError, ValueError):
    """The operation is not defined for deltas (hot-swapping, training, merging into a quantised base, ...)."""


class VocabularyError(MESwitchError, ValueError):
    """A prompt holds a token id outside the vocabulary of the expert asked to read it."""


class CompressionError(MESwitchError, ValueError):
    """An expert cannot be compressed against the base as asked."""


class BitDeltaError(MESwitchError, ValueError):
    """A file is no BitDelta diff, holds more than tensors, or does not fit the base."""


class DistillationError(MESwitchError, ValueError):
    """A delta's step sizes cannot be distilled as asked."""


class BudgetError(CompressionError):
    """No delta of the expert keeps the budget that was asked for; another budget may be kept without fitting anew."""


class VerificationError(MESwitchError, ValueError):
    """A delta cannot be verified as asked, or was found further from its expert than was allowed."""


class RouterError(MESwitchError, ValueError):
    """A router is missing, malformed, does not fit the model, or cannot be fitted to what was given."""


class MissingDependencyError(MESwitchError, ImportError):
    """An optional package is needed that is not installed."""
