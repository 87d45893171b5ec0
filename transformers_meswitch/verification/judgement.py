"""What a verification's numbers mean, in words, and the bits that a fine-tune needs.

With KL(expert ‖ base) the fine-tune moved the base's predictions so far, and with KL(expert ‖ base + delta) the delta
leaves so much of the way; their ratio is the *loss*. A fine-tune is **too far** from its base for the delta's bits if
the divergence left is above 0.1 nats a token; or above 0.01 with a loss above 5 %; or above 0.01 with expert and delta
disagreeing on the most probable token at more than one token in ten. Agreement alone decides nothing: where text is
random, such as names, the most probable token changes without anything being lost.

The limits are conventions that make deltas comparable. They do not replace a measurement on the expert's own task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..delta_format.spec import SUPPORTED_BITS

if TYPE_CHECKING:
    from .evidence import Evidence, TextEvidence, WeightEvidence

__all__ = ["bits_that_fit", "is_too_far", "judge"]

#: Nats a token.
_NEGLIGIBLE_KL, _MAX_KL = 0.01, 0.1
_MAX_LOSS = 0.05
_MIN_AGREEMENT = 0.9
#: Relative error of weights from which they belong to another expert, whose delta is about sqrt(2) away. One-bit codes
#: that make up for each other's errors in the layer's output may be farther from their own than no delta at all.
_FAR_AT_ONE_BIT = 1.3
#: Share of its energy that the best uniform quantiser of so many bits leaves of Gaussian values (J. Max, "Quantizing
#: for minimum distortion", IRE Transactions on Information Theory, 1960, table II).
_ENERGY_LEFT = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


def is_too_far(evidence: Evidence) -> bool | None:
    """Whether the delta loses too much of the fine-tune; `None` if no text was run."""
    text = evidence.text
    if text is None:
        return None
    return text.kl > _allowed(text) or (text.kl > _NEGLIGIBLE_KL and text.top1_agreement < _MIN_AGREEMENT)


def _allowed(text: TextEvidence) -> float:
    return min(_MAX_KL, max(_NEGLIGIBLE_KL, _MAX_LOSS * text.kl_base))


def bits_that_fit(weights: WeightEvidence, text: TextEvidence) -> int | None:
    """The fewest bits at which the loss should be within the limit, by a rule of thumb; `None` if even 4 are too few.

    To second order KL grows with the square of the weights' error, so it should fall by the same factor as the energy
    that a quantiser leaves: about 3 a bit.
    """
    now = _energy_left(weights)
    for bits in SUPPORTED_BITS:
        if _ENERGY_LEFT[bits] < now and text.kl * _ENERGY_LEFT[bits] / now <= _allowed(text):
            return bits
    return None


def _energy_left(weights: WeightEvidence) -> float:
    counts = weights.weights_by_bits
    total = sum(counts.values())
    return sum(_ENERGY_LEFT[int(bits)] * count for bits, count in counts.items()) / total if total else 0.0


def _belongs(evidence: Evidence) -> bool:
    """Whether the delta brings the base nearer to this expert at all."""
    text = evidence.text
    if text is not None:
        return text.kl < text.kl_base or text.kl <= _NEGLIGIBLE_KL
    errors = list(evidence.weights.relative_errors.values())
    one_bit = _energy_left(evidence.weights) > sum(_ENERGY_LEFT[bits] for bits in (1, 2)) / 2
    limit = _FAR_AT_ONE_BIT if one_bit else 1.0
    return 2 * sum(error >= limit for error in errors) <= len(errors)


def judge(evidence: Evidence) -> str:
    """A verdict in a sentence or two.

    >>> judge(evidence)  # doctest: +SKIP
    'The delta stands for the expert: it is 0.004 nats a token from the expert (KL), keeps 99.2% of what ...'
    """
    weights, text = evidence.weights, evidence.text
    if not _belongs(evidence):
        return (
            "The delta brings the base no nearer to this expert: check that base, expert and delta belong together; "
            "if they do, its bits are far too few."
        )
    if text is None:
        return (
            "Only weights were compared, which says nothing about answers: give text that the expert typically sees."
        )
    agrees = f"agrees with the expert on the most probable next token at {text.top1_agreement:.1%} of the tokens"
    if text.kl_base <= _NEGLIGIBLE_KL and text.kl <= _NEGLIGIBLE_KL:
        return (
            "On this text the fine-tune hardly differs from its base, so it says little about the delta: give text "
            "that the fine-tune was made for."
        )
    kept = f"keeps {1 - text.kl / text.kl_base:.1%} of what the fine-tune changed (1 − KL / KL of the base)"
    left = f"is {text.kl:.4g} nats a token from the expert (KL)"
    if not is_too_far(evidence):
        return f"The delta stands for the expert: it {left}, {kept}, and {agrees}."
    bits = " or ".join(weights.weights_by_bits) or "these"
    fitting = bits_that_fit(weights, text)
    cure = (
        "Give it more salient channels or keep it as a full model: by rule of thumb even 4 bits are too few."
        if fitting is None
        else f"Compress it again with {fitting} bits, by rule of thumb."
    )
    width = f"{bits} bit" if bits == "1" else f"{bits} bits"
    return f"This fine-tune is too far from its base for {width}: the delta {left}, {kept}, and {agrees}. {cure}"
