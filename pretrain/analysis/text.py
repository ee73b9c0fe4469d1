"""The text that is analysed: read from a file, or the paragraph below."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.utf8 import decoded, name_of, read_bytes

MOST_BYTES = 4 << 20
SAMPLE_NAME = "a paragraph of the project"
SAMPLE = """\
The old library stood at the end of the street, between the bakery and the river. Every morning Anna opened its \
heavy door, lit the lamps and put the books that had come back the day before in their places. She knew where every \
book stood: the maps in the cellar, the novels on the first floor, and the letters of the river captains in a \
cabinet that only she could open. One morning, in March 1987, a book was missing. It was the third volume of a \
history of the river, and nobody had borrowed it. Anna looked for the book in the cellar, she looked for it on the \
first floor, and at last she looked in the cabinet. There it lay, on top of the letters of the river captains. \
Between its pages she found a letter that began with the words: "To whoever opens this cabinet after me." The water \
had risen in the night, the letter said, and the third volume was the only one that told the truth about the flood.
"""


def read_text(path: Path | None) -> tuple[str, str]:
    """-> the text and what the page calls it. `path` None: the paragraph; `-`: standard input. Raises UserError for a
    file that is missing, empty, no UTF-8, or larger than an analysis makes sense for."""
    if path is None:
        return SAMPLE, SAMPLE_NAME
    name, data = name_of(path), read_bytes(path, "--text", MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(
            f"--text: {name} is larger than {MOST_BYTES >> 20} MiB, and an analysis shows only the beginning; cut out "
            f"the part that is to be looked at"
        )
    text = decoded(data, path, "--text")
    if "\0" in text:
        raise UserError(f"--text: {name} holds zero bytes, so it is a binary file; give plain text")
    if not text.strip():
        raise UserError(f"--text: {name} is empty; give some sentences, or leave the option out")
    return text, name
