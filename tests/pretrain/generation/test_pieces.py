"""Text from ids one by one, against the tokenizer's own decoding of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from data_prep.shards.format import Manifest
from pretrain.generation.pieces import TextStream
from pretrain.saved_model import Tokenizer

TEXTS = ["a b", "abc  de\nfg", "naïve 漢字 🙂 z", "\u200f é\t"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_the_tokenizer_decodes(text: str, prepared: Path) -> None:
    tokenizer = Tokenizer(Manifest.load(prepared))
    peer = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    prompt, ids = tokenizer.encode("gab"), tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert tokenizer.eos_id is not None
    parts = [stream.add(number) for number in [*ids, tokenizer.eos_id]]
    assert "\ufffd" not in "".join(parts) and not stream.end()
    assert "".join(parts) == peer.decode([*prompt, *ids]).removeprefix(peer.decode(prompt))
    if "🙂" in text:  # four bytes: nothing until the last
        first = next(place for place, number in enumerate(ids) if peer.id_to_piece(number) == "<0xF0>")
        assert parts[first : first + 4] == ["", "", "", "🙂"]


def test_bytes_that_are_no_text(prepared: Path) -> None:
    tokenizer = Tokenizer(Manifest.load(prepared))
    peer = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    stream = TextStream(tokenizer)
    begun, letter = peer.piece_to_id("<0xE2>"), tokenizer.encode("a")[-1]
    assert stream.add(begun) == "" and stream.add(letter) == "\ufffd" + peer.id_to_piece(letter).replace("▁", " ")
    assert stream.add(begun) == "" and stream.end() == "\ufffd"
    assert stream.add(peer.unk_id()) == " \u2047 "
