"""Tiny checkpoints of a base and its fine-tune, and an independent decoder of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 80}


def configuration(architecture, **changes):
    if architecture == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **(TOKENS | changes))
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig, "phi3": Phi3Config}
    classes |= {"gemma3": Gemma3TextConfig}
    heads = {} if architecture == "gpt_neox" else {"num_key_value_heads": 2}
    return classes[architecture](**(SIZES | TOKENS | heads | changes))


@pytest.fixture
def make_model():
    """(architecture, seed, **config changes) to a causal LM with random weights."""

    def make(architecture="llama", seed=0, **changes):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(configuration(architecture, **changes)).float().eval()

    return make


@pytest.fixture
def fine_tune():
    """A model's parameters moved by a little noise, in place."""

    def tune(model, seed=1, scale=0.02):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        return model

    return tune


@pytest.fixture
def make_pair(tmp_path, make_model, fine_tune):
    """(architecture, expert's resized vocabulary, **config changes) to folders of a base and of an expert."""

    def make(architecture="llama", vocabulary=None, **changes):
        torch.manual_seed(7)
        base, expert = make_model(architecture, **changes), fine_tune(make_model(architecture, **changes))
        if vocabulary:
            expert.resize_token_embeddings(vocabulary, mean_resizing=False)
        base.save_pretrained(tmp_path / "base")
        expert.save_pretrained(tmp_path / "expert")
        return tmp_path / "base", tmp_path / "expert"

    return make


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture
def edit_checkpoint():
    """(folder, function on the tensors by name): rewrite a checkpoint of one file."""

    def edit(folder, change):
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        tensors = change(tensors) or tensors
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    return edit


@pytest.fixture(scope="session")
def by_hand():
    """A linear's delta by the words of the format: a row as a string of bits, one scalar at a time."""

    def decode(record, tensors):
        out, total = record.out_features, record.in_features
        salient = tensors["salient_index"].tolist() if record.salient_channels else []
        coded = [i for i in range(total) if i not in salient]
        delta = np.zeros((out, total))
        for j in range(out):
            stream = "".join(format(byte, "08b")[::-1] for byte in tensors["codes"][j].tolist())
            for position, i in enumerate(coded):
                code = int(stream[position * record.bits : (position + 1) * record.bits][::-1], 2)
                delta[j, i] = (2 * code + 1 - 2**record.bits) / 2 * float(tensors["step"][j])
                if record.column_step:
                    delta[j, i] *= float(tensors["column_step"][position])
            for position, i in enumerate(salient):
                delta[j, i] = float(tensors["salient"][j, position])
        return delta

    return decode
