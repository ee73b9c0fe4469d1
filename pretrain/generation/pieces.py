"""Text from ids as they come: a piece joins the one before it, and a character whose bytes are not all there waits."""

from __future__ import annotations

import codecs

from pretrain.saved_model import Tokenizer


class TextStream:
    """What one text says, bit by bit. Bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, number: int) -> str:
        """What is certain now, often one piece; empty inside a character of several bytes."""
        return self._decoder.decode(self._tokenizer.content(number))

    def end(self) -> str:
        """What is left: bytes of a character that never came to its end, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
