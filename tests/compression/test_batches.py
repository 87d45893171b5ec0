"""Calibration text as token ids: nothing lost, nothing invented, and padding known for what it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch.compression.batches import pack, tokenize
from transformers_meswitch.errors import CompressionError

SEQUENCES = st.lists(st.lists(st.integers(0, 9), max_size=150), max_size=30)


def rows_of(batches):
    return [
        ids[: int(length)].tolist() for batch in batches for ids, length in zip(batch.ids, batch.lengths, strict=True)
    ]


@given(SEQUENCES, st.integers(150, 300), st.integers(1, 2000))
def test_every_sequence_is_there_once(sequences, max_length, batch_tokens):
    batches = list(pack(sequences, max_length=max_length, batch_tokens=batch_tokens))
    assert sorted(rows_of(batches)) == sorted(sequence for sequence in sequences if sequence)
    for batch in batches:
        rows, length = batch.ids.shape
        assert rows * length <= max(batch_tokens, length)
        assert length <= max_length
        assert batch.real.sum(dim=1).tolist() == batch.lengths.tolist()
        assert not batch.real[:, :-1].logical_not().logical_and(batch.real[:, 1:]).any(), "padding is on the right"
        # at most half is padding, but for the shortest sequences
        assert length <= 32 or (2 * batch.lengths > length).all() or length == max_length


def run(tokenizer, samples, **more):
    return tokenize(tokenizer, samples, **({"max_tokens": 1000, "vocab_size": 80} | more))


def test_text_is_read_as_far_as_asked_and_cut_to_the_models_positions(tokenizer):
    def samples():
        yield "abcd" * 16
        yield "xyz" * 30
        raise AssertionError("read too far")

    text = run(tokenizer, samples(), max_tokens=100)
    assert (text.samples, text.tokens) == (2, 100)
    assert {tuple(batch.ids.shape) for batch in text.batches} == {(2, 64)}
    assert rows_of(text.batches)[1] == tokenizer("xyz" * 12)["input_ids"]
    long = run(tokenizer, ["abcdefgh" * 40], max_positions=64)
    assert long.tokens == 320
    assert all(batch.ids.shape[1] <= 64 for batch in long.batches)


def test_the_digest_stands_for_the_tokens(tokenizer):
    texts = ["abcdefghijklmnopqrstuvwxyz" * 2, "the quick brown fox"]
    digests = [
        run(tokenizer, texts).digest(),
        run(tokenizer, texts[:1]).digest(),
        run(tokenizer, texts, max_tokens=60).digest(),
        run(tokenizer, [texts[0], "the quick brown fix"]).digest(),
    ]
    assert len(set(digests)) == 4
    assert run(tokenizer, texts).digest() == digests[0]


def test_a_beginning_that_template_and_tokenizer_both_write_is_taken_once(tokenizer):
    text = "abcd" * 16
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]

    class Doubling:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, sample, verbose):
            return {"input_ids": [self.bos_token_id, *ids]}

    assert rows_of(run(Doubling(), [text]).batches) == [ids]


@pytest.mark.parametrize("samples", [[], [""], ["abc"]])
def test_too_little_text_is_refused(tokenizer, samples):
    with pytest.raises(CompressionError, match="expected at least 32"):
        run(tokenizer, samples)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(CompressionError, match="gives the token id 29, but its embedding has 20 rows"):
        run(tokenizer, ["z" * 40], vocab_size=20)
