"""The peer: a sentence encoder (mean pooling, unit length) with logistic regression on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from transformers_meswitch import RouterOutput

__all__ = ["EncoderPeer"]

_BATCH = 32
#: Weight decay and length of the regression; features have unit length.
_PENALTY, _STEPS = 1e-4, 200


class EncoderPeer:
    """Fitted to embeddings of prompts by domain.

    Args:
        folder: of the encoder.
    """

    def __init__(self, folder: str) -> None:
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.bytes = sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix == ".safetensors")

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Float32 ``[texts, width]``."""
        found = []
        for start in range(0, len(texts), _BATCH):
            batch = self.tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    def fit(self, embedded: Mapping[str, Tensor]) -> dict[str, Any]:
        """Weights ``[domains, width]`` and biases by L-BFGS."""
        labels = sorted(embedded)
        x = torch.cat([embedded[label] for label in labels]).double()
        y = torch.cat([torch.full((len(embedded[label]),), i) for i, label in enumerate(labels)])
        weight = torch.zeros(len(labels), x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(labels), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + _PENALTY * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        return {"labels": labels, "weight": weight.detach(), "bias": bias.detach()}

    @staticmethod
    def ask(fitted: Mapping[str, Any], embedded: Tensor) -> RouterOutput:
        """Probabilities of prompts; it never abstains."""
        probabilities = (embedded.double() @ fitted["weight"].T + fitted["bias"]).softmax(dim=1).float()
        experts = [fitted["labels"][i] for i in probabilities.argmax(dim=1).tolist()]
        return RouterOutput(experts, probabilities, fitted["labels"], torch.zeros(len(experts), dtype=torch.bool))
