"""The fast decoder against transformers' own generation."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.decoding import ATTENTION, GreedyDecoder

NEW_TOKENS = 24


def model_and_prompts(device: str = "cpu") -> tuple[LlamaForCausalLM, list[list[int]]]:
    """A random model whose weights are large enough to say many things, and prompts of 1 to 30 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    lengths = [1, 30, 7, 7, 12, 25, 3, 18, 2, 30, 9, 21, 5]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    return LlamaForCausalLM(config).eval().to(device), prompts


def reference(model: LlamaForCausalLM, prompts: list[list[int]], end: int) -> list[list[int]]:
    """What ``generate`` says, prompt by prompt, so that no padding can play a part."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=2,
        )
        answer = output[0, len(prompt) :].tolist()
        answers.append(answer[: answer.index(end)] if end in answer else answer)
    return answers


def common_token(model: LlamaForCausalLM, prompts: list[list[int]]) -> int:
    """A token that ends some answers early, some late and some never."""
    answers = reference(model, prompts, end=0)
    counts = {token: sum(token in answer for answer in answers) for token in range(3, 61)}
    return min(counts, key=lambda token: abs(counts[token] - len(prompts) // 2))


@pytest.mark.parametrize("batch_size", [100, 13, 5, 1])
def test_tokens_are_those_of_generate(batch_size):
    model, prompts = model_and_prompts()
    end = common_token(model, prompts)
    expected = reference(model, prompts, end)
    lengths = {len(answer) for answer in expected}
    assert NEW_TOKENS in lengths
    assert len(lengths) > 2
    model.set_attn_implementation(ATTENTION)
    assert GreedyDecoder(model, end, graphs=False)(prompts, NEW_TOKENS, batch_size) == expected


def test_weights_may_be_exchanged_in_place_even_for_broken_ones():
    model, prompts = model_and_prompts()
    expected = reference(model, prompts, end=0)
    model.set_attn_implementation(ATTENTION)
    decoder = GreedyDecoder(model, 0, graphs=False)
    sound = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.inf)
    decoder(prompts, NEW_TOKENS, 5)
    model.load_state_dict(sound)
    assert decoder(prompts, NEW_TOKENS, 5) == expected
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert decoder(prompts, NEW_TOKENS, 5) != expected


def test_nothing_to_answer_and_one_token_to_answer():
    model, prompts = model_and_prompts()
    expected = reference(model, prompts, end=0)
    model.set_attn_implementation(ATTENTION)
    decoder = GreedyDecoder(model, 0, graphs=False)
    assert decoder([], NEW_TOKENS, 5) == []
    assert decoder(prompts, 1, 5) == [answer[:1] for answer in expected]


@pytest.mark.gpu
def test_graphs_give_the_same_tokens_and_follow_new_weights():
    model, prompts = model_and_prompts("cuda")
    end = common_token(model, prompts)
    expected = reference(model, prompts, end)
    model.set_attn_implementation(ATTENTION)
    decoder = GreedyDecoder(model, end, graphs=True)
    for _ in range(2):
        assert decoder(prompts, NEW_TOKENS, 5) == expected
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.copy_(weight.flip(0))
    assert decoder(prompts, NEW_TOKENS, 5) != expected
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    assert decoder(prompts, NEW_TOKENS, 5) == expected
