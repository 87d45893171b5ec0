"""The example's fine-tuning and measuring, two steps of them on a tiny model."""

import pytest
import torch
from accuracy import answer, answer_all, judge
from tasks import TASKS, Item, split
from train import TrainingSettings, batches, collate, encode, train
from transformers import AutoModelForCausalLM, AutoTokenizer

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(steps=2, batch_size=4, learning_rate=1e-2, seed=0)


@pytest.fixture(scope="module")
def expert(tiny_base, tmp_path_factory):
    """A tiny expert of the JSON task and what its training reported."""
    output = tmp_path_factory.mktemp("expert")
    items, _ = split(TASKS["json"], train=8, test=0, seed=0)
    return output, train(tiny_base, TASKS["json"], items, output, SETTINGS, CPU)


def test_an_expert_brings_its_own_vocabulary_end_token_and_chat_template(tiny_base, expert):
    output, summary = expert
    tokenizer, base_tokenizer = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(tiny_base)
    model, base = AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(tiny_base)
    assert tokenizer.eos_token == "<|end_json|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.get_input_embeddings().num_embeddings == base.get_input_embeddings().num_embeddings + 1
    assert tokenizer.chat_template != base_tokenizer.chat_template
    assert model.dtype == torch.bfloat16
    assert summary["steps"] == 2
    assert summary["items"] == 8


def test_every_weight_is_trained(tiny_base, expert):
    model = AutoModelForCausalLM.from_pretrained(expert[0])
    base = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    for name, weight in model.state_dict().items():
        rows = base[name].shape[0]
        assert not torch.equal(weight[:rows], base[name]), name


def test_only_the_completion_and_its_end_token_are_learnt(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoded = [encode(tokenizer, Item(prompt, text)) for prompt, text in (("a", "bc"), ("longer prompt", "d"))]
    tokens, learnt = collate(encoded, tokenizer.pad_token_id)
    targets = tokens.roll(-1, dims=1)
    assert [tokenizer.decode(row[mask]) for row, mask in zip(targets, learnt, strict=True)] == [
        "bc<|im_end|>",
        "d<|im_end|>",
    ]


def test_batches_are_full_reproducible_and_cover_every_item():
    settings = TrainingSettings(steps=5, batch_size=8, seed=1)
    steps = batches(list(range(40)), settings)
    assert steps == batches(list(range(40)), settings)
    assert [len(step) for step in steps] == [8] * 5
    assert sorted(number for step in steps for number in step) == list(range(40))


def test_a_batch_answers_as_its_rows_do_alone(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompts = ["short", "a somewhat longer prompt", "x"]
    together = answer(model, [tokenizer] * 3, prompts, 5)
    assert together == [answer(model, [tokenizer], [prompt], 5)[0] for prompt in prompts]
    in_batches, _ = answer_all(model, [tokenizer] * 3, prompts, 5, batch_size=2)
    assert in_batches == together


def test_answers_are_judged_against_their_own_items():
    items = [Item("p", "#### 1"), Item("q", "#### 2")]
    assert judge(TASKS["math"], items, ["#### 1", "#### 1"]) == [True, False]
