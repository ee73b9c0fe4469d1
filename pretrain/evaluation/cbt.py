"""The Children's Book Test (arXiv 1511.02301): which of ten words stood in a sentence, after twenty others of the book.

Files as published: cbtest_NE_test_2500ex.txt for named entities, and CN, V and P for common nouns, verbs and
prepositions. A question is a block of 21 numbered lines, and blank lines divide blocks: 20 sentences, then the 21st
with XXXXX in the place of the word, a tab, the word, two tabs, and ten candidates between bars.

The texts are tokenised; the blanks before punctuation are taken out again, as the authors of the models do. Candidates
are compared by the log-likelihood per token of candidate and rest of the sentence, after everything before; the result
is the mean over the kinds of words. Where the answer and the other candidates are not ten, the authors leave the
question out; so do we, and say how many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from pretrain.evaluation.examples import Example, Examples, Task, right_if_likelier_per_token
from pretrain.evaluation.files import files_of, numbered_lines

PUBLISHED = "the Children's Book Test (CBTest.tgz)"
KINDS = ("NE", "CN", "V", "P")
GAP = "XXXXX"
NUM_LINES, NUM_CANDIDATES = 21, 10
JOINED = (
    (" '", "'"),
    (" n't", "n't"),
    ("`` ", '"'),
    ("''", '"'),
    (" :", ":"),
    (" ;", ";"),
    (" !", "!"),
    (" ?", "?"),
    (" ,", ","),
    (" .", "."),
)
"""What tokenisation took apart, in the order in which it is put together."""


def detokenized(text: str) -> str:
    """The text without the blanks that tokenisation put before punctuation, and with plain quotation marks."""
    for apart, together in JOINED:
        text = text.replace(apart, together)
    return text


def read(path: Path) -> Examples:
    """Raises UserError."""
    patterns = tuple(f"cbtest_{kind}_test_*.txt" for kind in KINDS)
    examples: list[Example] = []
    left_out = 0
    for file in files_of(path, patterns, ("data", "CBTest", "CBTest/data"), PUBLISHED):
        kind, count = _kind(file), len(examples)
        for first, lines in _blocks(file):
            example = _example(file, kind, first, lines)
            if example is None:
                left_out += 1
            else:
                examples.append(example)
        if len(examples) == count:
            raise UserError(f"{file}: holds no question; download {PUBLISHED} again")
    return Examples(examples, left_out)


def _kind(file: Path) -> str:
    found = re.match(r"cbtest_([A-Z]+)_", file.name)
    if found is None:
        raise UserError(
            f"{file}: its name does not say the kind of word; keep the published one, cbtest_NE_test_...txt"
        )
    return found[1]


def _blocks(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, and the texts of the lines, of each block."""
    first, lines = 1, list[str]()
    for number, line in numbered_lines(file):
        if line.strip():
            expected, _, text = line.strip().partition(" ")
            if expected != str(len(lines) + 1):
                raise UserError(
                    f"{file} line {number}: does not begin with {len(lines) + 1}; a question has the lines 1 to "
                    f"{NUM_LINES}, then a blank one"
                )
            lines.append(text)
        elif lines:
            yield first, lines
            lines = []
        if not lines:
            first = number + 1
    if lines:
        yield first, lines


def _example(file: Path, kind: str, first: int, lines: list[str]) -> Example | None:
    last = first + len(lines) - 1
    if len(lines) != NUM_LINES:
        raise UserError(f"{file} line {last}: the question ends after {len(lines)} lines; it has {NUM_LINES}")
    sentences, fields = lines[:-1], [field for field in lines[-1].split("\t") if field]
    if len(fields) != 3 or GAP not in fields[0]:
        raise UserError(
            f"{file} line {last}: is not a question with {GAP}, a tab, the answer, two tabs and candidates between bars"
        )
    before, _, after = detokenized(fields[0]).partition(GAP)
    answer = fields[1]
    others = [word for word in fields[2].split("|") if word not in ("", answer)]
    if len(others) != NUM_CANDIDATES - 1:
        return None
    context = " ".join([*map(detokenized, sentences), before])
    return Example(f"{file} line {last}", kind, context, tuple(word + after for word in (answer, *others)))


CBT = Task("cbt", read, right_if_likelier_per_token, groups=len(KINDS))
