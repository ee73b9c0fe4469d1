"""Tokenizer of SwitchAll language models for transformers: the ids of the data that the model was trained on.

Exported models carry this file. `tokenizer.model` is a SentencePiece model, or with `kind` symbols the byte value of
each id, a byte each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

BLANK = "\u2581"
"""SentencePiece's sign for a blank: the only character that it cannot tell from one."""


class SwitchAllTokenizer(PreTrainedTokenizer):
    """Adds no token before or after a text. `</s>` in a text is text and not the token that ends a document, as in the
    data of the training; `split_special_tokens=False` makes it that token."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, kind: str = "sentencepiece", sentences: str = "documents", **kwargs: Any
    ) -> None:
        """`sentences`: `documents`, or `lines` where the data were cut into pieces line by line."""
        self._content = Path(vocab_file).read_bytes()
        self._kind, self._sentences = kind, sentences
        self._pieces: Any = None
        if kind == "sentencepiece":
            import sentencepiece

            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._content)
            self._names = [self._pieces.id_to_piece(number) for number in range(self._pieces.vocab_size())]
            self._prepare_blanks()
        else:
            self._ids = {value: number for number, value in enumerate(self._content)}
            self._names = [f"<0x{value:02X}>" for value in self._content]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(kind=kind, sentences=sentences, **kwargs)

    def _prepare_blanks(self) -> None:
        """How a text with SentencePiece's sign for a blank is encoded: that sign as its three bytes, the rest as if it
        came after a newline, so that nothing is put before it. Not where the model cannot be cut at newlines."""
        pieces, names = self._pieces, self._names
        self._newline = pieces.encode("\n")
        last = names[self._newline[-1]] if self._newline else ""
        self._blank = [pieces.piece_to_id(f"<0x{value:02X}>") for value in BLANK.encode("utf-8")]
        can_cut = last in ("\n", "<0x0A>") and not any("\n" in name and name != "\n" for name in names)
        if not can_cut or not all(map(pieces.is_byte, self._blank)) or self._sentences == "lines":
            self._blank = []

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    def get_vocab(self) -> dict[str, int]:
        return self._numbers | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._names[number] for number in self._encoded(text)]

    def _encoded(self, text: str) -> list[int]:
        if self._pieces is None:
            data = text.encode("utf-8")
            if unknown := set(data) - self._ids.keys():
                raise ValueError(f"the text holds the byte {min(unknown):#04x}, for which this model has no token")
            return [self._ids[value] for value in data]
        if self._sentences == "lines":
            return [number for line in re.findall(r"[^\n]*\n|[^\n]+", text) for number in self._pieces.encode(line)]
        if not self._blank or BLANK not in text:
            return list(self._pieces.encode(text))
        first, *others = text.split(BLANK)
        numbers = list(self._pieces.encode(first))
        for part in others:
            numbers += self._blank
            numbers += self._pieces.encode("\n" + part)[len(self._newline) :] if part else []
        return numbers

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._numbers or self._pieces is None:
            return self._numbers[token]
        return int(self._pieces.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else f"<unused {index}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._text([self._convert_token_to_id(token) for token in tokens])

    def _text(self, numbers: Iterable[int]) -> str:
        """Of ids none of which is special; those without a piece, which a model with a wider vocabulary may give, are
        nothing."""
        known = [number for number in numbers if 0 <= number < self.vocab_size]
        if self._pieces is not None:
            text = str(self._pieces.decode(known))
            # Where lines were cut into pieces one by one, SentencePiece has put a blank before each.
            has_blanks = (
                self._sentences == "lines" and self._pieces.id_to_piece(self._pieces.encode("a")[0])[0] == BLANK
            )
            return text.replace("\n ", "\n") if has_blanks else text
        return bytes(self._content[number] for number in known).decode("utf-8", errors="replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of ids. A special token stands between two texts, each of which is decoded by itself."""
        numbers = [token_ids] if isinstance(token_ids, int) else [int(number) for number in token_ids]
        special, parts, run = set(self.all_special_ids), [], []
        for number in numbers:
            if number not in special and number not in self._added_tokens_decoder:
                run.append(number)
                continue
            parts.append(self._text(run))
            run = []
            if not (skip_special_tokens and number in special):
                parts.append(self.convert_ids_to_tokens(number))
        return "".join([*parts, self._text(run)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / name
        path.write_bytes(self._content)
        return (str(path),)
