"""BPE by the word gives exactly SentencePiece's ids, and only models for which that holds are encoded so."""

import gzip
import io
import json
import random
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_prep.config.tokenizer import TokenizerConfig
from data_prep.stages import word_cache
from data_prep.stages.tokenizer import TextTokenizer, train_tokenizer
from data_prep.stages.word_cache import is_word_by_word
from tests.data_prep.conftest import make_texts
from tests.data_prep.raw_corpus import SAMPLE, sample_texts


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer([*sample_texts(60), *make_texts(60, seed=1)], TokenizerConfig(vocab_size=2000))


def check(model: bytes, texts: list[str]) -> None:
    tokenizer = TextTokenizer(model, name="m")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, reference.encode_as_numpy(text), err_msg=repr(text))
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  ", "\n", "\n\n", " \n ", "\n a", "a\n", "a ", " a", "a  b", "a \n b", "   \n   ", "a" * 500,
     "\n\n  a  \n\n b ", "\t a\t", "\r\n x", "\u00a0a\u00a0", "\u3000a \u3000", "\x00 \x00", "</s> <unk>",
     "🙂 🙂🙂", "中文 中 文", "1 23 456", "a\u2028b c"],
)  # fmt: skip
def test_odd_texts(model: bytes, text: str) -> None:
    check(model, [text])


def test_random_texts(model: bytes) -> None:
    rng = random.Random(2)
    parts = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "   ",
        "a",
        "the",
        "é",
        "中",
        "shard",
        "12",
        ".",
        "x" * 50,
        "\t",
        "🙂",
        "\x00",
        "The",
    ]
    check(model, ["".join(rng.choice(parts) for _ in range(rng.randint(0, 60))) for _ in range(3000)])


def test_real_texts_and_a_cache_that_overflows(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("c4/c4-validation.00000-of-00001.json.gz", "pes2o/valid-00000-of-00001.json.gz"):
        with gzip.open(SAMPLE / name) as stream:
            texts = [json.loads(line)["text"] for line in stream]
        check(model, texts)
    monkeypatch.setattr(word_cache, "MAX_WORDS", 50)
    check(model, texts)


def test_long_words_are_not_kept(model: bytes) -> None:
    """They hardly come again, and an address of 10,000 letters would stay as long as the process."""
    tokenizer = TextTokenizer(model, name="m")
    tokenizer.encode(f"the {'x' * 38} and {'x' * 39} {'x' * 40} {'x' * 10_000} end")
    words = tokenizer._words
    assert words is not None and max(map(len, words._ids)) == 40


def test_without_byte_fallback() -> None:
    plain = train_tokenizer(sample_texts(60), TokenizerConfig(vocab_size=2000, byte_fallback=False))
    assert is_word_by_word(plain)
    tokenizer = TextTokenizer(plain, name="m")
    reference = sentencepiece.SentencePieceProcessor(model_proto=plain)
    for text in ["中文 中文 文", "a 中 中\n中", "中\n中 🙂🙂 x", *make_texts(50, seed=7)]:
        if "▁" not in text:
            np.testing.assert_array_equal(tokenizer.encode(text), reference.encode_as_numpy(text), err_msg=repr(text))


def test_other_models_take_the_slow_way(model: bytes) -> None:
    assert is_word_by_word(model)
    assert not is_word_by_word(train_tokenizer(sample_texts(60), TokenizerConfig(type="unigram", vocab_size=1000)))
    for changes in (
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["\n", "a b"]},
        {"split_by_whitespace": False},
    ):
        made = io.BytesIO()
        settings: dict[str, Any] = {
            "model_type": "bpe", "vocab_size": 1000, "normalization_rule_name": "identity", "byte_fallback": True,
            "remove_extra_whitespaces": False, "user_defined_symbols": ["\n"], "minloglevel": 2, **changes,
        }  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(sample_texts(60)).split("\n")), model_writer=made, **settings
        )
        assert not is_word_by_word(made.getvalue()), changes
