"""The rules that drop documents: length, C4, Gopher quality and repetition, language.

Rules run from cheap to expensive, and the first that fails names the reason. Words are separated by whitespace.
Sources: Gopher, arXiv 2112.11446, section A.1 and table A1; C4: `c4_rules`. Thresholds that the
configuration does not name are those of the papers.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from common.errors import DataError
from data_prep.config.schema import ENGLISH, FilterConfig
from data_prep.stages.c4_rules import Page, clean_page

# (rule, what was measured and the limit), or None for a document that passes.
Verdict = tuple[str, str] | None

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
MIN_STOP_WORDS = 2
WORD_LENGTH = (3.0, 10.0)
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_WORDS_WITH_LETTER = 0.8
BULLETS = ("•", "‣", "◦", "-", "*")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")

MAX_REPEATED_LINES = 0.3
MAX_REPEATED_LINE_CHARACTERS = 0.2
# n: largest share of characters in the most frequent n-gram, in n-grams that occurred before.
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
RULES = (
    "too few words", "too many words", "lorem ipsum", "curly bracket", "too few sentences", "language", "word length",
    "symbols", "bullet lines", "ellipsis lines", "words without letters", "stop words", "repeated lines",
    "repeated line characters", "repeated paragraphs", "repeated paragraph characters",
    *(f"top {n}-gram" for n in MAX_TOP_NGRAM), *(f"repeated {n}-grams" for n in MAX_REPEATED_NGRAMS),
)  # fmt: skip


class Filters:
    """The rules that a configuration turns on."""

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        check_languages(config.language)
        self._language = LanguageIdentifier(config.language_characters) if config.language else None

    def verdict(self, text: str) -> Verdict:
        """Why a document is dropped, or None. With c4_lines, the other rules see what these leave of it."""
        config = self._config
        page = clean_page(text) if config.c4_lines else None
        text = plain_newlines(text) if page is None else page.text
        words = text.split()
        if len(words) < max(1, config.min_words):  # c4_lines may leave nothing
            return "too few words", f"{len(words)} words, fewer than {max(1, config.min_words)}"
        if len(words) > config.max_words:
            return "too many words", f"{len(words)} words, more than {config.max_words}"
        found = c4_page(text, page, config.c4_min_sentences) if config.c4 else None
        language = ENGLISH  # unless it is known, for the stop words of Gopher
        if found is None and self._language is not None:
            language = self._language(text)
            if language not in config.language:
                found = "language", f"{language}, not {', '.join(config.language)}"
        if found is None and config.gopher_quality:
            found = gopher_quality(text, words, is_english=language == ENGLISH)
        if found is None and config.gopher_repetition:
            found = gopher_repetition(text, words)
        return found


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises DataError for a language that py3langid never finds: everything would be dropped."""
    known = set(_language_model().nb_classes) if languages else set()
    for language in languages:
        if language not in known:
            raise DataError(f"filter.language: no {language!r}; py3langid knows {', '.join(sorted(known))}")


class LanguageIdentifier:
    """py3langid on the first characters of a text: its model ships in the package and is no pickle. On technical
    English it was right on 99% of 400 documents, fastText's lid.176.ftz on 89%."""

    def __init__(self, characters: int) -> None:
        self._model = _language_model()
        self._characters = characters

    def __call__(self, text: str) -> str:
        """ISO 639-1 code."""
        code: str = self._model.classify(text[: self._characters])[0]
        return code


@lru_cache(maxsize=1)
def _language_model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # here: loading it takes 1 s

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def c4_page(text: str, page: Page | None, min_sentences: int) -> Verdict:
    """The page rules of C4: as published on the lines of `page`, or, without line rules, on the whole text."""
    sentences = len(SENTENCE_END.findall(text)) if page is None else page.sentences
    if page.reason == "lorem ipsum" if page else "lorem ipsum" in text.lower():
        return "lorem ipsum", "holds the placeholder text"
    if page.reason == "curly bracket" if page else "{" in text:
        return "curly bracket", "holds a {"
    if sentences < min_sentences:
        return "too few sentences", f"{sentences} sentences, fewer than {min_sentences}"
    return None


def plain_newlines(text: str) -> str:
    """The text with every end of line as a newline: an empty line of a text from Windows separates paragraphs too."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def gopher_quality(text: str, words: list[str], *, is_english: bool = True) -> Verdict:
    """The quality rules of Gopher, length apart; the stop words are asked of English alone."""
    num_words = max(1, len(words))
    length = sum(map(len, words)) / num_words
    if not WORD_LENGTH[0] <= length <= WORD_LENGTH[1]:
        return "word length", f"{length:.2f} characters a word, not {WORD_LENGTH[0]:g} to {WORD_LENGTH[1]:g}"
    symbols = max(text.count("#"), sum(map(text.count, ELLIPSES))) / num_words
    if symbols > MAX_SYMBOLS_PER_WORD:
        return "symbols", f"{symbols:.2f} symbols a word, more than {MAX_SYMBOLS_PER_WORD}"
    lines = [line.strip() for line in text.split("\n") if line and not line.isspace()]
    bullets = sum(line.startswith(BULLETS) for line in lines) / max(1, len(lines))
    if bullets > MAX_BULLET_LINES:
        return "bullet lines", f"{bullets:.0%} of lines, more than {MAX_BULLET_LINES:.0%}"
    ellipses = sum(line.endswith(ELLIPSES) for line in lines) / max(1, len(lines))
    if ellipses > MAX_ELLIPSIS_LINES:
        return "ellipsis lines", f"{ellipses:.0%} of lines, more than {MAX_ELLIPSIS_LINES:.0%}"
    letters = sum(1 for word in words if word.isalpha() or LETTER.search(word)) / num_words
    if letters < MIN_WORDS_WITH_LETTER:
        return "words without letters", f"{letters:.0%} of words have a letter, fewer than {MIN_WORDS_WITH_LETTER:.0%}"
    stop_words = len(STOP_WORDS.intersection(text.lower().split()))
    if is_english and stop_words < MIN_STOP_WORDS:
        return "stop words", f"{stop_words} of {len(STOP_WORDS)} stop words, fewer than {MIN_STOP_WORDS}"
    return None


def gopher_repetition(text: str, words: list[str]) -> Verdict:
    """The repetition rules of Gopher. Shares of characters count those of words, so spaces weigh nothing."""
    lines = [line.strip() for line in text.split("\n") if line and not line.isspace()]
    found = _repeated(lines, "line")
    if found is None and "\n\n" in text:
        found = _repeated([part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()], "paragraph")
    if found is not None:
        return found
    starts = [0, *accumulate(map(len, words))]
    total = max(1, starts[-1])
    for n, limit in MAX_TOP_NGRAM.items():
        share = _top_ngram(words, n) / total
        if share > limit:
            return f"top {n}-gram", f"{share:.0%} of characters, more than {limit:.0%}"
    # What an (n+1)-gram covers is covered by its n-grams too, so shares fall with n: most documents need only n = 5.
    for n, limit in MAX_REPEATED_NGRAMS.items():
        share = sum(starts[stop] - starts[start] for start, stop in _repeated_spans(words, n)) / total
        if share > limit:
            return f"repeated {n}-grams", f"{share:.0%} of characters, more than {limit:.0%}"
        if share <= min(MAX_REPEATED_NGRAMS.values()):
            break
    return None


def _repeated(units: list[str], name: str) -> Verdict:
    """The rules on lines or paragraphs that occurred before in the document."""
    if len(set(units)) == len(units):
        return None
    seen: set[str] = set()
    count = characters = 0
    for unit in units:
        if unit in seen:
            count += 1
            characters += len(unit)
        seen.add(unit)
    if count > MAX_REPEATED_LINES * len(units):
        return f"repeated {name}s", f"{count} of {len(units)}, more than {MAX_REPEATED_LINES:.0%}"
    total = sum(map(len, units))
    if characters > MAX_REPEATED_LINE_CHARACTERS * total:
        share = characters / total
        return f"repeated {name} characters", f"{share:.0%}, more than {MAX_REPEATED_LINE_CHARACTERS:.0%}"
    return None


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _top_ngram(words: list[str], n: int) -> int:
    """Characters that the most frequent n-gram covers, those of overlapping occurrences once; of several as frequent,
    the most. 0 if none occurs twice."""
    counts = Counter(_ngrams(words, n))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    top = {ngram for ngram, count in counts.items() if count == most}
    covered: dict[tuple[str, ...], tuple[int, int]] = {}  # (characters so far, word behind the last occurrence)
    for start, ngram in enumerate(_ngrams(words, n)):
        if ngram in top:
            characters, stop = covered.get(ngram, (0, 0))
            new = words[max(start, stop) : start + n]
            covered[ngram] = characters + sum(map(len, new)), start + n
    return max(characters for characters, _ in covered.values())


def _repeated_spans(words: list[str], n: int) -> Iterator[tuple[int, int]]:
    """Disjoint ranges of words that together are the n-grams that occurred before in the document."""
    seen: set[tuple[str, ...]] = set()
    covered = 0
    for start, ngram in enumerate(_ngrams(words, n)):
        if ngram in seen:
            yield max(start, covered), start + n
            covered = start + n
        else:
            seen.add(ngram)
