"""Text from ids as they come: a piece joins the one before it, and a character whose bytes are not all there waits."""

from __future__ import annotations

import codecs

from pretrain.saved_model import Tokenizer


class TextStream:
    """What one text says, bit by bit. Bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, *, after: str = "") -> None:
        """`after`: what the text goes on from."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins_line = tokenizer.has_blanks_before_lines and after.endswith("\n")

    def add(self, number: int) -> str:
        """What is certain now, often one piece; empty inside a character of several bytes."""
        content = self._tokenizer.content(number)
        if content and self._tokenizer.has_blanks_before_lines:
            said = content[self._begins_line and content.startswith(b" ") :]
            self._begins_line, content = content.endswith(b"\n"), said
        return self._decoder.decode(content)

    def end(self) -> str:
        """What is left: bytes of a character that never came to its end, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
