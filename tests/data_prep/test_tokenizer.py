"""The tokenizer: exact both ways, reproducible, and its sample."""

import errno
import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from common.errors import DataError
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.stages.selection import Selection
from data_prep.stages.tokenizer import (
    MAX_LINE_CHARACTERS,
    SEGMENT_CHARACTERS,
    SampleSource,
    TextTokenizer,
    sample_documents,
    train_tokenizer,
    training_lines,
)
from data_prep.work.parts import Part, PartWriter
from tests.data_prep.conftest import make_texts


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(make_texts(150, seed=9), TokenizerConfig(vocab_size=500))


def test_special_pieces(model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (pieces.unk_id(), pieces.eos_id(), pieces.bos_id(), pieces.pad_id()) == (0, 1, -1, -1)
    assert pieces.vocab_size() == TextTokenizer(model, name="m").vocab_size == 500
    assert pieces.id_to_piece(2) == "\n"


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "  a  ", "▁", "▁▁ ▁", "a▁\n▁ b", "\r\n\t\x00", "🙂", "</s><unk>", "e\u0301"]
)
def test_odd_texts_survive(model: bytes, text: str) -> None:
    tokenizer = TextTokenizer(model, name="m")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Ids that are there already tell the bytes of their text; no blank stands before U+2581, which is three bytes.
    assert tokenizer.piece_bytes()[ids].sum() - tokenizer.prefix_bytes()[ids[:1]].sum() == len(text.encode())


def test_bytes_of_ids_are_those_of_their_text_also_of_models_that_others_made(model: bytes) -> None:
    """Without a blank before a text; and with a piece that encoding does not use, but ids of another program may be."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    unused = TextTokenizer(model, name="m").encode("shard")[0]
    proto.pieces[int(unused)].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED  # type: ignore[attr-defined]
    tokenizer = TextTokenizer(proto.SerializeToString(), name="m")
    for ids in (
        tokenizer.encode(" a shard\nb"),
        tokenizer.encode("a"),
        np.array([unused, *tokenizer.encode("a"), unused]),
    ):
        size = tokenizer.piece_bytes()[ids].sum() - tokenizer.prefix_bytes()[ids[:1]].sum()
        assert size == len(tokenizer.decode(ids).encode()), ids


def test_random_texts_survive(model: bytes) -> None:
    tokenizer = TextTokenizer(model, name="m")
    rng = random.Random(3)
    parts = ["▁", " ", "  ", "\n", "a", "é", "中", "shard ", "12", "x" * 700, "\n\n", "\x00"]
    for _ in range(400):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_texts_give_the_same_ids_as_in_one_go(model: bytes) -> None:
    tokenizer = TextTokenizer(model, name="m")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "\n".join(make_texts(120, seed=4)).replace("▁", "")
    assert len(text) > 10 * SEGMENT_CHARACTERS
    np.testing.assert_array_equal(tokenizer.encode(text), reference.encode(text))


def test_the_newline_of_a_unigram_model_is_a_normal_piece_and_texts_survive() -> None:
    """No user-defined piece: SentencePiece would look up every character among them."""
    trained = train_tokenizer(make_texts(150, seed=9), TokenizerConfig(type="unigram", vocab_size=340))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained)
    newline = pieces.piece_to_id("\n")
    assert newline == 2 and not pieces.is_control(newline) and pieces.get_score(newline) < -0.1
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(trained)
    assert not [piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    tokenizer = TextTokenizer(trained, name="m")
    for text in [*make_texts(60, seed=5), "\n", "\n\n a\n", "a\n" * 3000, "▁\n▁", "中\n🙂"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert (ids == newline).sum() == text.count("\n")


def test_digits_are_split(model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [p for p in pieces.encode("2048 42", out_type=str) if p.strip("▁")] == [
        "2",
        "0",
        "4",
        "8",
        "4",
        "2",
    ]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(kind: str) -> None:
    config = TokenizerConfig.model_validate({"type": kind, "vocab_size": 330})
    digests = {hashlib.sha256(train_tokenizer(make_texts(60, seed=1), config)).hexdigest() for _ in range(2)}
    assert len(digests) == 1


def test_training_lines_are_never_long_enough_to_be_dropped() -> None:
    text = "short\n\n" + "é" * 5000 + "\n" + "word " * 900 + "\n" + "🙂" * 1500
    lines = list(training_lines([text]))
    assert "".join(lines) == text.replace("\n", "")
    assert max(len(line.encode()) for line in lines) <= 4192
    assert max(map(len, lines)) <= MAX_LINE_CHARACTERS
    assert "" not in lines


@pytest.mark.parametrize(
    "vocab_size, message",
    [
        (60000, r"60000 is too large for this text; use at most \d+"),
        (262, "too small for this text; use more than"),
    ],
)
def test_an_impossible_vocabulary_names_the_limit(vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(make_texts(20, seed=1), TokenizerConfig(vocab_size=vocab_size))


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(["", "\n"], TokenizerConfig())


@pytest.mark.parametrize("error", [DataError("PART was damaged"), OSError(errno.EIO, "Input/output error", "PART")])
def test_what_reading_the_texts_raises_is_what_training_raises(error: Exception) -> None:
    """SentencePiece makes a RuntimeError of it, which would pass for a refusal to train, with a traceback in it."""

    def texts() -> Iterator[str]:
        yield from make_texts(20, seed=1)
        raise error

    with pytest.raises(type(error)) as raised:
        train_tokenizer(texts(), TokenizerConfig(vocab_size=500))
    assert raised.value is error


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"x\.model is not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*none\.model"):
        TextTokenizer.load(tmp_path / "none.model")


def write_parts(folder: Path, name: str, *halves: list[str]) -> tuple[Part, ...]:
    """Parts of one raw file, with these documents each."""
    parts = []
    for texts in halves:
        writer = PartWriter(folder, f"{name}{len(parts)}", "train")
        for position, text in enumerate(texts):
            writer.add(text.encode(), position)
        parts.append(writer.finish(((name, len(texts)),)))
    return tuple(parts)


def test_the_sample_is_of_what_is_left_of_each_file_by_its_size(tmp_path: Path) -> None:
    texts = {
        "a": [f"a{number:03}" + 46 * "x" for number in range(400)],
        "b": [f"b{number:03}" + 46 * "x" for number in range(100)],
    }
    sources = [
        SampleSource(parts=write_parts(tmp_path, name, of_file[::2], of_file[1::2]), files=frozenset("ab"))
        for name, of_file in texts.items()
    ]
    (tmp_path / "dropped").mkdir()
    rules = {part.name: np.arange(part.documents) % 2 for source in sources for part in source.parts}
    for name, rule in rules.items():
        safetensors.numpy.save_file({"rule": rule.astype(np.uint8)}, tmp_path / "dropped" / f"{name}.safetensors")

    def sample(sample_bytes: int | None, *, of: int = 2, filtered: bool = False) -> list[str]:
        selection = Selection(ingest=tmp_path, filter=tmp_path / "dropped" if filtered else None)
        found = sample_documents(sources[:of], selection, sample_bytes=sample_bytes, seed=0, validation_fraction=0.0)
        return [text[:4] for text in found]

    assert len(sample(None)) == len(sample(25_000)) == 500, "all of it, to the last byte"
    assert Counter(name[0] for name in sample(5_000)) == {"a": 80, "b": 20}, "a fifth of each"
    assert len(sample(24_999)) < 500
    kept = sample(10**9, filtered=True)
    assert len(kept) == 250 and not any(int(name[1:]) // 2 % 2 for name in kept), "what a filter drops teaches nothing"
    # 40 documents are a share of the first file, of whose first four shares, in its two parts, they are chosen.
    few = sample(2_000, of=1)
    assert len(few) == 40 and all(int(name[1:]) % 2 == 0 and int(name[1:]) < 320 for name in few)


def test_the_sample_is_capped_seeded_and_free_of_validation_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {name: [f"{name} {number} " + "word " * 20 for number in range(300)] for name in "ab"}
    sources = []
    for name in "ab":
        parts = write_parts(tmp_path, name, texts[name][:150], texts[name][150:])
        sources.append(SampleSource(parts=parts, files=frozenset("ab")))

    def sample(sample_bytes: int, seed: int = 0, validation_fraction: float = 0.0) -> list[str]:
        found = sample_documents(
            sources,
            Selection(ingest=tmp_path),
            sample_bytes=sample_bytes,
            seed=seed,
            validation_fraction=validation_fraction,
        )
        return list(found)

    everything = texts["a"] + texts["b"]
    assert sample(10**9) == everything
    small = sample(10_000)
    assert 9_000 < sum(map(len, small)) <= 10_000
    assert small == sample(10_000) != sample(10_000, seed=1)
    assert small == [text for text in everything if text in set(small)]  # in input order
    assert {text[0] for text in small} == {"a", "b"}
    without = sample(10**9, validation_fraction=0.2)
    assert 0.7 * 600 < len(without) < 0.9 * 600
    capsys.readouterr()
    sample(5 * 600 * 20)
    assert not capsys.readouterr().err.count("warning")
    assert sample(200) == []  # 100 bytes of each file, where no text fits
    assert "100% of those looked at are longer" in capsys.readouterr().err
