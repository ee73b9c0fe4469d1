"""The tokenizer file of exports gives the ids of the data, and the text back; kinds of tokenizers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from common.errors import UserError
from data_prep.shards.manifest_records import TokenizerEntry
from data_prep.stages.tokenizer import TextTokenizer
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.export import verify
from pretrain.export.tokenizer_config import check_tokenizer, special_ids, stored_tokenizer, tokenizer_config
from pretrain.saved_model import Tokenizer
from tests.pretrain.export.models import config_of

TEXTS = [
    "Two words.\nThird  word, and\tmore: 12,345 \u2581 \u2581\u2581x\u2581",
    " leading and trailing \n\n",
    "\u2581",
    "</s> is text, <unk> too; \u00e9\u4e2d\U0001f600",
    "",
    "line\r\nline",
]


def tokenizer_of(stored: StoredTokenizer, folder: Path) -> Any:
    """Written as an export has it, and loaded by transformers."""
    from pretrain.export.tokenization_switchall import SwitchAllTokenizer

    model = config_of("dense")
    content = check_tokenizer(stored, model)
    (folder / "tokenizer.model").write_bytes(content)
    settings = tokenizer_config(stored, content, model, special_ids(stored, content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return SwitchAllTokenizer.from_pretrained(folder)


def sentencepiece_entry(prepared: Path) -> TokenizerEntry:
    return TokenizerEntry.model_validate(json.loads((prepared / "manifest.json").read_text())["tokenizer"])


def test_ids_of_the_data_and_the_text_back(prepared: Path, tmp_path: Path) -> None:
    reference = TextTokenizer.load(prepared / "tokenizer.model")
    stored = StoredTokenizer(entry=sentencepiece_entry(prepared), folder=prepared)
    tokenizer = tokenizer_of(stored, tmp_path)
    batch = tokenizer(TEXTS)["input_ids"]
    assert batch == [reference.encode(text).tolist() for text in TEXTS]
    assert tokenizer.batch_decode(batch) == TEXTS and all(map(len, batch[:4]))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (400, 1, 0)
    padded = tokenizer(["a", "a longer text"], padding=True)
    assert padded["attention_mask"][0][0] == 0 and padded["attention_mask"][0][-1] == 1  # on the left
    ids = [*batch[0], 1, *batch[3], 402]  # two documents, and an id that no piece has
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[0] + TEXTS[3]
    assert tokenizer.decode(ids) == f"{TEXTS[0]}</s>{TEXTS[3]}"
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(TEXTS[0])) == TEXTS[0]
    assert tokenizer("a</s>", split_special_tokens=False)["input_ids"][-1] == 1
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == 400 and all(tokenizer.convert_ids_to_tokens(i) == t for t, i in vocabulary.items())
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(tokenizer).from_pretrained(tmp_path / "saved")(TEXTS)["input_ids"] == batch
    assert stored_tokenizer(tmp_path / "saved", None).entry == stored.entry
    with pytest.raises(UserError, match="is not the tokenizer of this model"):
        stored_tokenizer(tmp_path, {"sha256": "0" * 64})


def test_an_end_that_was_added_to_the_pieces_is_refused(prepared: Path, tmp_path: Path) -> None:
    """As for conversations. It passed for the unknown piece, at which texts then ended."""
    tokenizer = tokenizer_of(StoredTokenizer(entry=sentencepiece_entry(prepared), folder=prepared), tmp_path)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"eos_token is <\|end\|>, which is no piece of tokenizer\.model"):
        stored_tokenizer(tmp_path, None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    assert stored_tokenizer(tmp_path, None).entry.eos_id is None


def test_line_by_line(prepared: Path, tmp_path: Path) -> None:
    stored = StoredTokenizer(entry=sentencepiece_entry(prepared), folder=prepared, by_line=True)
    reference = TextTokenizer.load(prepared / "tokenizer.model")
    tokenizer = tokenizer_of(stored, tmp_path)
    ids = tokenizer(TEXTS)["input_ids"]
    assert tokenizer.batch_decode(ids) == [text.replace("\u2581", " ") for text in TEXTS]
    assert ids == [reference.encode_lines(text).tolist() for text in TEXTS]
    assert ids != [reference.encode(text).tolist() for text in TEXTS]
    assert stored_tokenizer(tmp_path, None).by_line


@pytest.mark.parametrize("kind", ["bytes", "symbols"])
def test_bytes(kind: str, tmp_path: Path) -> None:
    values = bytes(range(256)) if kind == "bytes" else b"\n abc\xc3\xa9"
    entry = TokenizerEntry(kind="bytes", vocab_size=256)
    if kind == "symbols":
        (tmp_path / "symbols").write_bytes(values)
        entry = TokenizerEntry(kind="symbols", file="symbols", sha256=_sha256(values), vocab_size=len(values))
    tokenizer = tokenizer_of(StoredTokenizer(entry=entry, folder=tmp_path), tmp_path)
    ids = tokenizer("cab \u00e9\n")["input_ids"]
    assert ids == [values.index(byte) for byte in "cab \u00e9\n".encode()] and tokenizer.decode(ids) == "cab \u00e9\n"
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id == (0 if kind == "bytes" else None)
    if kind == "symbols":
        with pytest.raises(ValueError, match="holds the byte 0x64, for which this model has no token"):
            tokenizer("abcd")
    found = stored_tokenizer(tmp_path, None).entry
    assert (found.kind, found.vocab_size, found.eos_id) == (kind, len(values), None)


def test_a_text_with_letters_that_the_pieces_lack_is_verified(tmp_path: Path) -> None:
    """transformers shows the unknown piece as a token, SentencePiece as a sign."""
    made = io.BytesIO()
    lines = ["the river ran to the sea", "a box of letters and a lamp"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, model_type="bpe", vocab_size=40, minloglevel=2
    )
    (tmp_path / "pieces").write_bytes(made.getvalue())
    entry = TokenizerEntry(file="pieces", sha256=_sha256(made.getvalue()), vocab_size=40, eos_id=2)
    stored = StoredTokenizer(entry=entry, folder=tmp_path)
    tokenizer = tokenizer_of(stored, tmp_path)
    ids = verify._check_tokenizer(tokenizer, Tokenizer(stored))
    assert tokenizer.unk_token_id in ids and ids == tokenizer(verify.TEXT)["input_ids"]
    tokenizer._pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces"), add_bos=True)
    with pytest.raises(UserError, match="gives other ids"):
        verify._check_tokenizer(tokenizer, Tokenizer(stored))


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
