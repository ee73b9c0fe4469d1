"""Given SentencePiece models that change text: said with an example, refused unless `tokenizer.allow_lossy`."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_prep.cli import main
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from data_prep.stages.lossy import EXAMPLE, PROBES, describe_losses, losses
from data_prep.stages.tokenizer import TextTokenizer
from launch.slurm import preparation
from tests.data_prep.conftest import Corpus, make_texts

IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BYTES: dict[str, Any] = {"byte_fallback": True, "vocab_size": 500}


def trained(**settings: Any) -> bytes:
    """A model as SentencePiece makes it, by its own defaults but for `settings`."""
    made = io.BytesIO()
    lines = [line for text in make_texts(150, seed=9) for line in text.split("\n") if line]
    options = {"model_type": "bpe", "vocab_size": 250, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, **options)
    return made.getvalue()


@pytest.fixture(scope="module")
def foreign() -> bytes:
    """SentencePiece's defaults: nmt_nfkc, no pieces for bytes."""
    return trained()


def test_a_model_that_keeps_every_text_loses_nothing() -> None:
    model = trained(**IDENTITY, **BYTES)
    assert losses(TextTokenizer(model, name="m")) == []
    assert describe_losses(model, "m") == ""


def test_every_probe_that_the_default_normaliser_changes_is_named() -> None:
    """Against Unicode's own NFKC, with blanks as SentencePiece documents nmt: all of them one blank, none at the ends,
    zero-width ones gone or a blank. With pieces for bytes nothing is lost for want of a piece."""
    named = set(losses(TextTokenizer(trained(**BYTES), name="m")))
    changed = {
        name
        for name, text in PROBES.items()
        if " ".join(unicodedata.normalize("NFKC", text).replace("\u200b", " ").replace("\u2581", " ").split()) != text
    }
    assert named == changed
    assert named.isdisjoint({"capitals"}) and {"newlines", "tabs", "symbols", "repeated blanks"} <= named


@pytest.mark.parametrize(
    "settings, lost",
    [
        ({**IDENTITY, "remove_extra_whitespaces": True}, ["blanks at the ends", "repeated blanks"]),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, ["newlines", "tabs", "capitals"]),
        ({**IDENTITY, "normalization_rule_name": "nfkc"}, ["symbols"]),
    ],
)
def test_other_losses_are_found_and_shown(settings: dict[str, Any], lost: list[str]) -> None:
    message = describe_losses(trained(**settings, **BYTES), "m")
    assert set(lost) <= set(losses(TextTokenizer(trained(**settings, **BYTES), name="m")))
    assert all(name in message for name in lost)
    before, after = message.split("): ")[1].split(" comes back as ")
    assert before != after, "the example shows the loss"


def test_without_pieces_for_bytes_rare_characters_are_lost() -> None:
    message = describe_losses(trained(**IDENTITY, vocab_size=250), "m")
    assert "rare characters" in message and "no pieces for bytes" in message and "⁇" in message


def test_such_a_model_needs_the_key_and_then_a_warning_shows_what_is_lost(
    corpus: Corpus, foreign: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t5.model").write_bytes(foreign)
    given = {"model": str(tmp_path / "t5.model")}
    reference = sentencepiece.SentencePieceProcessor(model_proto=foreign)
    after = repr(reference.decode(reference.encode(EXAMPLE))).replace("  ", " \\x20")
    config = corpus.write_config(tmp_path / "c.json", tokenizer=given, output=str(tmp_path / "out"))
    for command in ("run", "ingest", "shard"):
        assert main([command, "--config", str(config)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: tokenizer.model ") and error.count("\n") == 1
        assert "newlines" in error and "nmt_nfkc" in error and "tokenizer.allow_lossy=true" in error
        assert f"{EXAMPLE!r} comes back as {after}" in error
    assert not (tmp_path / "out").exists(), "refused before any work"
    assert main(["run", "--config", str(config), "--set", "tokenizer.allow_lossy=true"]) == 0
    captured = capsys.readouterr()
    assert "warning: tokenizer.model " in captured.err and f"comes back as {after}" in captured.err
    with SplitReader(Manifest.load(tmp_path / "out"), "train", verify_on_first_read=True) as reader:
        for number in range(20):
            ids = reader.document(number).tolist()
            assert [n for n in ids if n != reference.eos_id()] == reference.encode(corpus.train[number])


def test_the_key_changes_nothing_else(
    corpus: Corpus, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the data of a model that keeps every text, nor of one that is trained."""
    config = corpus.write_config(tmp_path / "c.json", output=str(prepared))
    assert main(["run", "--config", str(config), "--set", "tokenizer.allow_lossy=true"]) == 0
    given = {"model": str(prepared / "tokenizer.model"), "allow_lossy": True}
    other = corpus.write_config(tmp_path / "d.json", output=str(tmp_path / "out"), tokenizer=given)
    assert main(["run", "--config", str(other)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("up to date: ") and "changes text" not in captured.err


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        ({"vocab_size": 251}, "has 250 pieces; set tokenizer.vocab_size to that"),
        ({}, "tokenizer.allow_lossy=true"),
    ],
)
def test_slurm_jobs_are_not_submitted_with_it(
    corpus: Corpus,
    foreign: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokenizer: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "t5.model").write_bytes(foreign)
    body = {**corpus.config, "tokenizer": {"model": str(tmp_path / "t5.model"), **tokenizer}}
    (tmp_path / "c.json").write_text(json.dumps({**body, "output": str(tmp_path / "out")}))
    arguments = ["--config", str(tmp_path / "c.json"), "--tasks", "1", "--time", "1:00:00", "--dry-run"]
    assert preparation.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
