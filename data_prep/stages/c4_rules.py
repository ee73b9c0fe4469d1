"""C4's rules for lines and pages, in the order of the code that made it (TensorFlow Datasets, text/c4_utils.py,
`clean_page`) and of the paper (arXiv 1910.10683, section 2.2, in the version of JMLR 21).

Line by line, without the blanks around it: a line with a word of more than 1,000 characters goes; citation markers are
taken out; a line that ends in no terminal mark or in an ellipsis, or that has fewer than 5 words, goes. Of what is
left, a line with "lorem ipsum" drops the page; one that mentions javascript goes; one with a curly bracket drops the
page; one with a phrase of policies goes. A page with fewer than 3 sentences in the lines that stay is dropped.

Not here: the list of bad words, removal of lines that other pages have too, and Punkt, by which the published code
counts sentences (`count_sentences`).
"""

import itertools
import re
from dataclasses import dataclass

MIN_WORDS_PER_LINE = 5
MAX_WORD_CHARACTERS = 1000
END_MARKS = (".", "?", "!", '"')
ELLIPSIS = "..."
CITATION = re.compile(r"\[(?:[0-9]*|edit|citation needed)\]")
POLICY_PHRASES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip

# The end of a sentence inside a line: a word with a mark and what may close behind it, and no small letter next.
SENTENCE_MARKS, CLOSING = (".", "!", "?"), "\"'”’)]"
ABBREVIATIONS = frozenset(
    {
        "mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr.", "inc.", "ltd.", "co.", "u.s.", "vs.", "e.g.", "i.e.",
        "etc.", "cf.", "al.", "fig.", "figs.", "eq.", "no.", "vol.", "p.", "pp.",
    }
)  # fmt: skip
INITIAL = re.compile(r"[A-Za-z]\.")


@dataclass(frozen=True)
class Page:
    """What the rules make of a text."""

    lines: tuple[str, ...]
    """Lines that stay, without citation markers and the blanks around them."""
    dropped: tuple[str, ...]
    """Lines that go, as they were."""
    reason: str
    """"lorem ipsum" or "curly bracket", whichever line drops the page first; empty if none does."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines).strip()

    @property
    def sentences(self) -> int:
        return sum(map(count_sentences, self.lines))


def clean_page(text: str) -> Page:
    """Applies the line rules to a whole text. The page rules are only noted, so that a caller may ignore them."""
    lines, dropped, reason = [], [], ""
    for original in text.splitlines():
        line = _without_citations(original.strip())
        if line is None or not _is_sentence_line(line):
            dropped.append(original)
            continue
        lowered = line.lower()
        if not reason and "lorem ipsum" in lowered:
            reason = "lorem ipsum"
        if "javascript" in lowered:
            dropped.append(original)
            continue
        if not reason and "{" in line:
            reason = "curly bracket"
        if any(phrase in lowered for phrase in POLICY_PHRASES):
            dropped.append(original)
            continue
        lines.append(line)
    return Page(tuple(lines), tuple(dropped), reason)


def _without_citations(line: str) -> str | None:
    """The line without [1], [], [edit] and [citation needed]; None for one with an endless word."""
    if len(line) > MAX_WORD_CHARACTERS and any(len(word) > MAX_WORD_CHARACTERS for word in line.split()):
        return None
    return CITATION.sub("", line) if "[" in line else line


def _is_sentence_line(line: str) -> bool:
    return line.endswith(END_MARKS) and not line.endswith(ELLIPSIS) and len(line.split()) >= MIN_WORDS_PER_LINE


def count_sentences(line: str) -> int:
    """Sentences of a line, at least 1: marks inside it that end one, and its end. A mark does not if a small letter
    follows, or if it is that of an initial or of a common abbreviation."""
    breaks = 0
    for word, following in itertools.pairwise(line.split()):
        word = word.rstrip(CLOSING)
        if word.endswith(SENTENCE_MARKS) and not following[0].islower():
            breaks += word.lower().lstrip("(\"'“") not in ABBREVIATIONS and not INITIAL.fullmatch(word)
    return breaks + 1
