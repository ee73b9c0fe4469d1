"""The tokenizer of an export: its file, and what transformers must know of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece

from common.errors import UserError
from common.hashing import sha256_file
from data_prep.shards.format import BYTE_VALUES
from data_prep.shards.manifest_records import TokenizerEntry
from model.config import ModelConfig
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.export.folder import TOKENIZER, TOKENIZER_CONFIG

TOKENIZER_CLASS = "SwitchAllTokenizer"
IS_MODEL = {"sentencepiece": True, "symbols": False}
"""By `kind` of tokenizer_config.json."""
BY_LINE = {"lines": True, "documents": False}
"""By `sentences` of tokenizer_config.json."""
ALL_BYTES = bytes(range(BYTE_VALUES))
"""The file of symbols of a model whose ids are bytes."""


def check_tokenizer(tokenizer: StoredTokenizer, model: ModelConfig) -> bytes:
    """The content of tokenizer.model; empty of ids, which have none. Raises UserError: no file, another one than the
    data's, more pieces than the model has rows."""
    entry, path = tokenizer.entry, tokenizer.path
    if entry.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size: is {model.vocab_size}, but the tokenizer has {entry.vocab_size} pieces; it is not that "
            f"of this model"
        )
    if path is None:
        return ALL_BYTES if entry.has_text else b""
    try:
        if sha256_file(path) != entry.sha256:
            raise UserError(f"{path} is not the tokenizer that its data set names (another sha256); restore the file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def special_ids(tokenizer: StoredTokenizer, content: bytes) -> dict[str, int | None]:
    """Ids by the names of transformers. What ends a document also begins a text out of nothing. Padding is the piece
    for what has no piece: EOS as padding would hide it from the loss of many a fine-tuning. Bytes pad with zero, ids
    of which nothing is known with nothing."""
    entry = tokenizer.entry
    pad: int | None
    if entry.kind == "sentencepiece":
        pad = _pieces(content).unk_id()
    else:
        pad = content.index(0) if 0 in content else None
    return {"bos_token_id": entry.eos_id, "eos_token_id": entry.eos_id, "pad_token_id": pad}


def tokenizer_config(
    tokenizer: StoredTokenizer, content: bytes, model: ModelConfig, special: dict[str, int | None]
) -> dict[str, Any]:
    is_model = tokenizer.entry.kind == "sentencepiece"
    named = _pieces(content).id_to_piece if is_model else lambda number: f"<0x{content[number]:02X}>"
    ids = {"eos_token": special["eos_token_id"], "pad_token": special["pad_token_id"]}
    if is_model:
        ids["unk_token"] = special["pad_token_id"]  # see special_ids
    tokens = {name: named(number) for name, number in ids.items() if number is not None}
    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "auto_map": {"AutoTokenizer": [f"tokenization_switchall.{TOKENIZER_CLASS}", None]},
        "kind": "sentencepiece" if is_model else "symbols",
        "sentences": "lines" if tokenizer.by_line else "documents",
        **tokens,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **({} if model.memory_length else {"model_max_length": model.sequence_length}),
    }


def stored_tokenizer(folder: Path, known: dict[str, Any] | None) -> StoredTokenizer:
    """The tokenizer in the export `folder`. `known`: the entry of training.json, where there is one. Raises
    UserError."""
    if known is not None and known.get("kind") == "ids":  # files that a user put there are of another tokenizer
        return StoredTokenizer(entry=TokenizerEntry.model_validate(known), folder=folder)
    path, settings_path = folder / TOKENIZER, folder / TOKENIZER_CONFIG
    try:
        content = path.read_bytes()
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        is_model, by_line = IS_MODEL[settings["kind"]], BY_LINE[settings["sentences"]]
        eos_token = settings.get("eos_token")
        if not isinstance(eos_token, str | None):
            raise TypeError
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {error.filename or path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{settings_path} is not of an export; export the model again") from None
    digest = sha256_file(path)
    if known is not None and known["sha256"] not in (None, digest):
        raise UserError(f"{path} is not the tokenizer of this model (another sha256); restore the file")
    if not is_model and content == ALL_BYTES:
        return StoredTokenizer(entry=TokenizerEntry(kind="bytes", vocab_size=BYTE_VALUES), folder=folder)
    size, eos = len(content), None
    if is_model:
        pieces = _pieces(content, str(path))
        size = pieces.vocab_size()
        eos = pieces.piece_to_id(eos_token) if eos_token else None
        if eos is not None and pieces.id_to_piece(eos) != eos_token:  # SentencePiece gives the unknown piece
            raise UserError(
                f"{settings_path}: eos_token is {eos_token}, which is no piece of {TOKENIZER} but was added to them; "
                f"only pieces can be kept here: set it to one that ends a text, or to null"
            )
    entry = TokenizerEntry(
        kind="sentencepiece" if is_model else "symbols", file=TOKENIZER, sha256=digest, vocab_size=size, eos_id=eos
    )
    return StoredTokenizer(entry=entry, folder=folder, by_line=by_line)


def _pieces(content: bytes, name: str = TOKENIZER) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise UserError(f"{name} is not a SentencePiece model; restore the file") from None
