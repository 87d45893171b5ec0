"""A tiny base, a fine-tune of it and its delta, each with a tokenizer, for the commands to work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from transformers_meswitch import MESwitchConfig, compress

WORDS = ("<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Repos:
    base: Path
    expert: Path
    delta: Path


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Repos:
    folder = tmp_path_factory.mktemp("repos")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    repos = Repos(folder / "base", folder / "expert", folder / "delta")
    for path in (repos.base, repos.expert):
        model.save_pretrained(path)
        fast.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    compress(
        repos.base,
        repos.expert,
        repos.delta,
        MESwitchConfig(bits=2, salient_channels=4),
        calibration=None,
        progress=False,
    )
    return repos
