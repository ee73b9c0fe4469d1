"""Text to token ids and back, as the data of a run were made: by SentencePiece, bytes, or numbered byte values.

Where a tokenizer that is not here made the ids, the text of ids is their numbers, with blanks between them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from common.errors import UserError
from data_prep.shards.format import BYTE_VALUES, Manifest
from pretrain.checkpoint.tokenizer_file import StoredTokenizer

SPACE_SYMBOL = "\u2581"
"""SentencePiece's sign for a blank."""
NO_TEXT = "the run's data are token ids whose tokenizer is not here (tokenizer.type ids), so there is no text"
UNKNOWN_TEXT = " \u2047 "
"""What SentencePiece decodes the unknown id to."""


TASK_IS_TEXT = (
    f"{NO_TEXT}, and this task is text; export the model (launch/export.py), put its tokenizer's files beside it, and "
    f"evaluate that"
)


class Tokenizer:
    """The tokenizer of a data set. `eos_id` ends a document; None if nothing, or a text, does."""

    def __init__(self, source: Manifest | StoredTokenizer) -> None:
        """Raises UserError if the file is missing or is no tokenizer."""
        stored = StoredTokenizer.of(source) if isinstance(source, Manifest) else source
        self.stored = stored
        entry, path = stored.entry, stored.path
        self.vocab_size, self.eos_id, self.kind = entry.vocab_size, entry.eos_id, entry.kind
        self.has_text = entry.has_text
        self._model: sentencepiece.SentencePieceProcessor | None = None
        self._values = np.arange(BYTE_VALUES, dtype=np.uint8)
        self._by_line = stored.by_line
        if path is None:
            return
        content = _content(path)
        if entry.kind == "symbols":
            self._values = np.frombuffer(content, np.uint8)
            return
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model; prepare the data again") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS. Raises UserError for a byte that has no id, for what is no number where ids have
        no text, and for half of a surrogate pair (as an argument that is no UTF-8 has them), which is no text."""
        if not self.has_text:
            return [self._id(word) for word in text.split()]
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start + 1} of the text, {text[error.start]!a}, is half of a pair or a byte that is "
                f"no UTF-8; give text in UTF-8"
            ) from None
        if self._model is None:
            return self._numbers(data)
        if self._by_line:
            lines = re.findall(r"[^\n]*\n|[^\n]+", text)
            return [number for line in lines for number in self._model.encode(line)]
        if SPACE_SYMBOL not in text or not (symbol := self._space_symbol):
            return list(self._model.encode(text))
        newline = len(self._model.encode("\n"))
        first, *others = text.split(SPACE_SYMBOL)
        ids = list(self._model.encode(first))
        for part in others:  # after a newline, which is cut off again, so that nothing is put before it
            ids += symbol + (self._model.encode("\n" + part)[newline:] if part else [])
        return ids

    @functools.cached_property
    def _space_symbol(self) -> list[int]:
        """Its three bytes, as the data have them, since SentencePiece takes the character for a blank. Empty where the
        model has no bytes, or cannot be cut at newlines: there the data have a blank."""
        model = self._model
        assert model is not None
        symbol = [model.piece_to_id(f"<0x{value:02X}>") for value in SPACE_SYMBOL.encode()]
        pieces, newline = [model.id_to_piece(n) for n in range(model.vocab_size())], model.encode("\n")
        can_cut = newline and pieces[newline[-1]] in ("\n", "<0x0A>")
        is_across = any("\n" in piece and piece != "\n" for piece in pieces)
        return symbol if can_cut and not is_across and all(map(model.is_byte, symbol)) else []

    def _id(self, word: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) >= self.vocab_size:
            raise UserError(
                f"{NO_TEXT}; give ids with blanks between them, 0 to {self.vocab_size - 1}, instead of {word[:40]!a}"
            )
        return int(word)

    def _numbers(self, data: bytes) -> list[int]:
        numbers = np.full(BYTE_VALUES, -1)
        numbers[self._values] = np.arange(len(self._values))
        ids = numbers[np.frombuffer(data, np.uint8)]
        if (ids < 0).any():
            value = data[int(np.argmax(ids < 0))]
            raise UserError(
                f"the text holds the byte {value:#04x}, which is none of the {len(self._values)} that the run's data "
                f"have; leave such characters out"
            )
        return ids.tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Ids behind the last one of the tokenizer, which a
        wider model may have, are nothing."""
        if not self.has_text:
            return "".join(map(self._piece, ids))
        known = [int(number) for number in ids if number < self.vocab_size]
        if self._model is None:
            return self._values[np.asarray(known, np.int64)].tobytes().decode("utf-8", errors="replace")
        text = str(self._model.decode(known))
        return text.replace("\n ", "\n") if self.has_blanks_before_lines else text

    def content(self, number: int) -> bytes:
        """What an id adds to a text that goes on, in UTF-8: a byte's id one byte of a character, a control id (EOS) and
        one behind the tokenizer's last nothing."""
        if not self.has_text:
            return self._piece(number).encode()
        if number >= self.vocab_size:
            return b""
        if self._model is None:
            return self._values[number].tobytes()
        if self._model.is_control(number):
            return b""
        if self._model.is_byte(number):
            return bytes([int(self._model.id_to_piece(number)[3:-1], 16)])
        if self._model.is_unknown(number):
            return UNKNOWN_TEXT.encode()
        return str(self._model.id_to_piece(number)).replace(SPACE_SYMBOL, " ").encode()

    def bytes_of(self, counts: np.ndarray) -> int | None:
        """Bytes in UTF-8 of a text that has each id as often as `counts` [n] says, with the blank that SentencePiece
        puts before a document (not those before its other lines, where these were cut one by one); None where ids have
        no text, or some are unknown, whose text is lost."""
        present = np.flatnonzero(counts[: self.vocab_size]).tolist()
        if not self.has_text or (self._model is not None and any(map(self._model.is_unknown, present))):
            return None
        contents, is_cut = {number: self.content(number) for number in present}, self.has_blanks_before_lines
        return sum(int(counts[n]) * (len(text) - is_cut * text.count(b"\n")) for n, text in contents.items())

    @functools.cached_property
    def has_blanks_before_lines(self) -> bool:
        """Whether ids hold a blank before each line, which the text does not have."""
        model = self._model
        return self._by_line and model is not None and model.id_to_piece(model.encode("a")[0])[0] == SPACE_SYMBOL

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for inside a text; a byte that is no character of its own as <0xE2>."""
        return [self._piece(int(number)) for number in ids]

    def _piece(self, number: int) -> str:
        if not self.has_text:
            return f" {int(number)}"
        if number >= self.vocab_size:
            return f"<unused {number}>"
        if self._model is None:
            return _byte(int(self._values[number]))
        if self._model.is_byte(number):
            return _byte(int(self._model.id_to_piece(number)[3:-1], 16))
        return str(self._model.id_to_piece(number)).replace(SPACE_SYMBOL, " ")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}; copy its folder again, whole") from None


def _byte(value: int) -> str:
    return chr(value) if value < 0x80 else f"<0x{value:02X}>"
