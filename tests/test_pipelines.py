"""``pipeline("text-generation")`` over a delta and over a family: each expert with its own tokenizer and template."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from tests.fixtures_models import CODE_EOS, CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily, dense_model
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import ExpertNotFoundError

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
#: How to decode an answer, the same in all releases of transformers.
READING = {"return_full_text": False, "skip_special_tokens": False, "clean_up_tokenization_spaces": False}
CHAT = [{"role": "user", "content": "1+1="}]


@pytest.fixture(scope="module")
def expected(tiny_family: TinyFamily) -> Any:
    """A function from expert and text to the answer of stock model and tokenizer, special tokens included."""
    models = {name: dense_model(tiny_family.base, path) for name, path in tiny_family.deltas.items()}
    models[None] = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    folders = {**tiny_family.experts, None: tiny_family.base}

    def answer(name: str | None, text: str | list[dict[str, str]]) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folders[name])
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = models[name].generate(ids, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **GREEDY)
        return str(tokenizer.decode(output[0, ids.shape[1] :], clean_up_tokenization_spaces=False))

    return answer


@pytest.fixture(scope="module")
def saved(tiny_family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family repo."""
    folder = tmp_path_factory.mktemp("family")
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas)).save_pretrained(
        folder
    )
    return folder


def ask(pipe: Any, text: Any, **kwargs: Any) -> Any:
    output = pipe(text, **READING, **{**GREEDY, **kwargs})
    return [answer[0] for answer in output] if isinstance(output[0], list) else output[0]["generated_text"]


@pytest.mark.parametrize("name", ["math", "code"])
def test_over_a_delta(tiny_family: TinyFamily, expected: Any, name: str) -> None:
    pipe = pipeline("text-generation", model=str(tiny_family.deltas[name]))
    assert len(pipe.tokenizer) == (CODE_VOCAB_SIZE if name == "code" else VOCAB_SIZE)
    assert ask(pipe, "2+2=") == expected(name, "2+2=")
    assert ask(pipe, CHAT) == expected(name, CHAT)
    assert ask(pipe, "2+2=", expert=None) == expected(None, "2+2=") != expected(name, "2+2=")
    eos = pipe.model.generation_config.eos_token_id
    assert eos == (CODE_EOS if name == "code" else 2)


def test_over_a_family(saved: Path, expected: Any) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    answers = {name: ask(pipe, "2+2=", expert=name) for name in ("math", "code", None)}
    assert answers == {name: expected(name, "2+2=") for name in answers}
    assert len(set(answers.values())) == 3
    assert ask(pipe, "2+2=") == answers[None]
    pipe.model.set_expert("code")
    assert ask(pipe, "2+2=") == answers["code"]
    # The expert's own template puts an added token first, which no other tokenizer can read.
    assert ask(pipe, CHAT) == expected("code", CHAT)
    assert ask(pipe, CHAT, expert="math") == expected("math", CHAT)
    assert pipe(CHAT, expert="code", **GREEDY)[0]["generated_text"][0] == CHAT[0]
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        ask(pipe, "2+2=", expert="poet")


def test_expert_at_construction_and_in_a_generation_config(saved: Path, expected: Any) -> None:
    pipe = pipeline("text-generation", model=str(saved), expert="code")
    assert len(pipe.tokenizer) == CODE_VOCAB_SIZE
    assert ask(pipe, CHAT) == expected("code", CHAT)
    assert ask(pipe, CHAT, expert="math") == expected("math", CHAT)
    pipe = pipeline("text-generation", model=str(saved))
    config = GenerationConfig(expert="code", pad_token_id=0, **GREEDY)
    output = pipe(CHAT, generation_config=config, **READING)
    assert output[0]["generated_text"] == expected("code", CHAT)
    pipe.model.generation_config.expert = "code"
    assert ask(pipe, CHAT) == expected("code", CHAT)


def test_batches(saved: Path, expected: Any) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    texts = ["2+2=", "1*", "(a+b)", "7"]
    for name in ("code", None):
        output = pipe(texts, batch_size=2, expert=name, return_full_text=False, **GREEDY)
        alone = [pipe(text, expert=name, return_full_text=False, **GREEDY) for text in texts]
        assert output == alone
    chats = [CHAT, [{"role": "user", "content": "7"}]]
    output = pipe(chats, batch_size=2, expert="code", **GREEDY)
    assert output == [pipe(chat, expert="code", **GREEDY) for chat in chats]


def test_batches_are_padded_with_the_experts_own_padding(saved: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved), expert="code")
    pipe.tokenizer.pad_token = "<add-3>"
    texts = ["2+2=", "1*"]
    for name in ("code", None):  # the base cannot read "<add-3>"
        output = pipe(texts, batch_size=2, expert=name, **GREEDY)
        assert output == [pipe(text, expert=name, **GREEDY) for text in texts]


def test_an_expert_for_each_input(saved: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    texts, experts = ["2+2=", "1*", "2+2=", "7"], ["code", None, "math", "code"]
    output = pipe(texts, expert=experts, batch_size=2, **GREEDY)
    assert output == [pipe(text, expert=name, **GREEDY) for text, name in zip(texts, experts, strict=True)]
    assert output[0] != output[2]
    chats = [CHAT, CHAT]
    assert pipe(chats, expert=["code", "math"], **GREEDY) == [pipe(CHAT, expert=n, **GREEDY) for n in ("code", "math")]
    for inputs, named in ((texts, 3), ("2+2=", 1), (CHAT, 2)):
        with pytest.raises(ValueError, match=rf"{named} experts were named for"):
            pipe(inputs, expert=["math"] * named, **GREEDY)


def test_stop_strings_are_matched_in_the_experts_tokens(saved: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    for name in ("code", "math"):
        tokenizer = pipe.model.tokenizer_for(name, padding_side="left")
        _, forward, _ = pipe._sanitize_parameters(stop_sequence="<add-2>", expert=name)
        if "tokenizer" in forward:
            assert forward["tokenizer"] is tokenizer
        else:  # transformers 5.17 makes an EOS of each of the string's tokens
            assert forward["eos_token_id"] == tokenizer.encode("<add-2>")


def test_explicit_tokenizer_wins(saved: Path, tiny_family: TinyFamily) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_family.experts["code"], chat_template="{{ messages[0].content }}7")
    pipe = pipeline("text-generation", model=str(saved), tokenizer=tokenizer)
    pipe.model.set_expert("code")
    assert pipe.tokenizer is tokenizer
    ids = tokenizer("1+1=7", return_tensors="pt").input_ids
    output = pipe.model.generate(ids, **GREEDY)
    assert ask(pipe, CHAT) == tokenizer.decode(output[0, ids.shape[1] :], clean_up_tokenization_spaces=False)


def test_a_model_without_experts_is_untouched(tiny_family: TinyFamily, expected: Any) -> None:
    pipe = pipeline("text-generation", model=str(tiny_family.base))
    assert ask(pipe, "2+2=") == expected(None, "2+2=")
    assert ask(pipe, CHAT) == expected(None, CHAT)


def test_model_object(tiny_family: TinyFamily, expected: Any) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base, experts=dict(tiny_family.deltas), dtype=torch.float32
    )
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_family.base))
    assert ask(pipe, CHAT, expert="code") == expected("code", CHAT)


def test_the_callers_tokenizers_are_left_alone(saved: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    tokenizer = pipe.model.tokenizer_for("code")
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    pipe(["2+2=", "1*"], batch_size=2, expert="code", **GREEDY)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)


def test_threads_do_not_swap_tokenizers(saved: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved))
    inside, done = threading.Event(), threading.Event()

    def ask_code() -> None:
        with pipe._tokenizer_of({"expert": "code"}):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=ask_code)
    thread.start()
    inside.wait(10)
    seen = len(pipe.tokenizer)
    with pipe._tokenizer_of({"expert": "math"}):
        done.set()
        thread.join()
        assert (seen, len(pipe.tokenizer)) == (VOCAB_SIZE, VOCAB_SIZE)
    assert len(pipe.tokenizer) == VOCAB_SIZE


def test_an_explicit_copy_of_the_bases_tokenizer_is_replaced(tiny_family: TinyFamily) -> None:
    """As the class says: it cannot be told from the one that ``pipeline`` loads by itself."""
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_family.base))
    with pipe._tokenizer_of({"expert": "code"}):
        assert len(pipe.tokenizer) == CODE_VOCAB_SIZE


def test_inputs_of_any_kind_with_an_expert_each(tiny_family: TinyFamily, expected: Any) -> None:
    """In a ``PeftModel`` too."""
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model = PeftModel.from_pretrained(base, tiny_family.deltas["math"], adapter_name="math")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="code")
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_family.base))
    texts, experts = ["2+2=", "3+3="], ["code", "math"]
    for inputs in (texts, tuple(texts), iter(texts)):
        found = ask(pipe, inputs, expert=experts)
        assert [f["generated_text"] for f in found] == [expected(e, t) for e, t in zip(experts, texts, strict=True)]
    assert ask(pipe, CHAT, expert="code") == expected("code", CHAT)
    with pytest.raises(ValueError, match="2 experts were named for 1 inputs"):
        ask(pipe, "2+2=", expert=experts)
