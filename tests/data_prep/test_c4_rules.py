"""C4's rules against a statement of the published ones in other words, on real pages and on odd ones."""

from __future__ import annotations

import gzip
import itertools
import json
import random

import pytest

from data_prep.config.schema import FilterConfig
from data_prep.stages.c4_rules import POLICY_PHRASES, clean_page, count_sentences
from data_prep.stages.filters import Filters
from tests.data_prep.raw_corpus import SAMPLE

C4_ALONE = {"min_words": 0, "max_words": 10**9, "gopher_quality": False, "gopher_repetition": False, "c4_lines": True}
FILTERS = Filters(FilterConfig.model_validate(C4_ALONE))
ODD_LINES = [
    "Menu",
    "Home | About",
    "",
    "   ",
    "Only four words here.",
    "This one has five words.",
    "It ends in an ellipsis, sadly...",
    "Please enable JavaScript to read all of this page.",
    "We use cookies to make this page better.",
    "By reading on you accept our Terms of Use today.",
    "Our privacy policy says what we do.",
    "The lorem ipsum text stands for a text to come.",
    "lorem ipsum dolor sit amet",
    "A function f() { return; } is what this line shows.",
    "if (a) { b }",
    'He said that it was "quite good"',
    "A fact that someone checked.[12] And another one here.[citation needed]",
    "History[edit]",
    "This claim has a marker at its very end.[3]",
    "Two words.[1][2]",
    "It is over now![]",
    "One \u2028 two three four five.",
    "x" * 1001 + " and four more words.",
    "Is it so that this is a question?",
    "Dr. Smith met Mr. Jones at 5 p.m. today.",
    "One. Two. Three. Four. Five. All of these are short.",
    "A javascript line with lorem ipsum in it too.",
    "A cookie policy { in braces } is a page to drop.",
    "Ends in a right quote, which is not a mark\u201d",
    "  Blanks around these five words.  ",
]


SHORT = set(
    json.loads(
        '["mr","mrs","ms","dr","prof","st","jr","sr","inc","ltd","co","u.s","vs","e.g","i.e","etc","cf","al","fig","figs",'
        '"eq","no","vol","p","pp"]'
    )
)


def published(text: str) -> str | None:
    """The page as C4's code leaves it, or None where it drops the page. A line at a time, in its order, with words
    walked one by one; sentences are counted by `sentences_of`."""
    stays: list[str] = []
    sentences = 0
    for raw in text.splitlines():
        words = raw.split()
        if any(len(word) > 1000 for word in words):
            continue
        line = without_markers(raw.strip())
        if line[-1:] not in set('.?!"') or line[-3:] == "...":
            continue
        if len(line.split()) < 5:
            continue
        small = line.lower()
        if small.find("lorem ipsum") >= 0:
            return None
        if small.find("javascript") >= 0:
            continue
        if line.find("{") >= 0:
            return None
        if [p for p in ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
                        "use cookies") if small.find(p) >= 0]:  # fmt: skip
            continue
        sentences += sentences_of(line)
        stays.append(line)
    return "\n".join(stays).strip() if sentences >= 3 else None


def without_markers(line: str) -> str:
    """Without [], [7], [edit] and [citation needed]."""
    result, rest = "", line
    while "[" in rest:
        before, _, rest = rest.partition("[")
        inside, closed, behind = rest.partition("]")
        if closed and (inside in ("edit", "citation needed", "") or set(inside) <= set("0123456789")):
            result, rest = result + before, behind
        else:
            result += before + "["
    return result + rest


def sentences_of(line: str) -> int:
    """The last word, and each that ends in a mark, with what may close behind it, before one that begins not small."""
    words = line.split()
    count = 1
    for word, following in itertools.pairwise(words):
        bare = word.rstrip("\"'”’)]")
        if bare[-1:] not in tuple(".!?") or following[0].islower():
            continue
        stem = bare.lower().lstrip("(\"'“")
        initial = len(bare) == 2 and bare[0].isascii() and bare[0].isalpha() and bare[1] == "."
        if initial or (stem.endswith(".") and stem[:-1] in SHORT):
            continue
        count += 1
    return count


def ours(text: str) -> str | None:
    found = FILTERS.verdict(text)
    return None if found is not None else clean_page(text).text


def real_pages() -> list[str]:
    texts = []
    for path in sorted(SAMPLE.glob("*/*.json.gz")):
        with gzip.open(path) as stream:
            texts += [json.loads(line)["text"] for line in stream]
    return texts


def test_real_pages_come_out_as_by_the_published_rules() -> None:
    texts = real_pages()
    assert len(texts) > 200
    results = [(ours(text), published(text)) for text in texts]
    assert [ours for ours, _ in results] == [theirs for _, theirs in results]
    dropped = sum(theirs is None for _, theirs in results)
    changed = sum(theirs is not None and theirs != text for text, (_, theirs) in zip(texts, results, strict=True))
    assert dropped > 0 and changed > 20, "the rules had something to do"


def test_pages_of_odd_lines_come_out_as_by_the_published_rules() -> None:
    """Every line alone and in threes, and 3,000 pages of lines drawn at random."""
    rng = random.Random(0)
    pages = [*ODD_LINES, *("\n".join([line] * 3) for line in ODD_LINES)]
    pages += [rng.choice(["\n", "\r\n"]).join(rng.choices(ODD_LINES, k=rng.randint(1, 9))) for _ in range(3000)]
    assert [ours(page) for page in pages] == [published(page) for page in pages]
    assert 300 < sum(ours(page) is None for page in pages) < len(pages) - 300


FIVE = "This one has five words."


@pytest.mark.parametrize(
    "text, left",
    [
        ("\n".join([FIVE] * 3), "\n".join([FIVE] * 3)),  # 3 sentences are enough, 2 are not
        ("\n".join([FIVE] * 2), None),
        ("\n".join(["Only four words here."] * 9), None),
        ("\n".join([FIVE] * 3 + ["We use cookies on this page."]), "\n".join([FIVE] * 3)),
        ("\n".join([FIVE] * 3 + ["Well known to them all.[4]"]), "\n".join([FIVE] * 3 + ["Well known to them all."])),
        ("\n".join([FIVE] * 3 + ["four words and one [4]."]), "\n".join([FIVE] * 3 + ["four words and one ."])),
        ("\n".join([FIVE] * 3 + ["four words and one[4][5]"]), "\n".join([FIVE] * 3)),
        ("\n".join([FIVE] * 3 + ["lorem ipsum"]), "\n".join([FIVE] * 3)),  # the line goes before it drops the page
        ("\n".join([FIVE] * 3 + ["Now lorem ipsum stands here, see."]), None),
        ("\n".join([FIVE] * 3 + ["x = {}"]), "\n".join([FIVE] * 3)),
        ("\n".join([FIVE] * 3 + ["Now there is a { in it."]), None),
        ("\n".join([FIVE] * 3 + ["Now javascript goes before a {."]), "\n".join([FIVE] * 3)),
        ("\n".join([FIVE] * 3 + ["A long word: " + 1000 * "x" + " it is."]),
         "\n".join([FIVE] * 3 + ["A long word: " + 1000 * "x" + " it is."])),
        ("\n".join([FIVE] * 3 + ["A long word: " + 1001 * "x" + " it is."]), "\n".join([FIVE] * 3)),
    ],
    ids=lambda text: str(text)[-30:],
)  # fmt: skip
def test_the_values_of_the_published_code(text: str, left: str | None) -> None:
    assert ours(text) == published(text) == left


def test_a_page_is_dropped_for_what_comes_first() -> None:
    lorem, curly = "Now lorem ipsum stands here, see.", "Now there is a { in it."
    assert clean_page(f"{lorem}\n{curly}").reason == "lorem ipsum"
    assert clean_page(f"{curly}\n{lorem}").reason == "curly bracket"


def test_policy_phrases_are_the_published_six() -> None:
    assert len(POLICY_PHRASES) == 6
    for phrase in POLICY_PHRASES:
        assert clean_page(f"About our {phrase.upper()} we say this.").lines == ()


def test_page_rules_without_line_rules_look_at_the_whole_text() -> None:
    filters = Filters(FilterConfig.model_validate({**C4_ALONE, "c4_lines": False}))
    cases = {
        "One. Two. Three.": None,
        "One. Two.": "too few sentences",
        "One. Two. Three. {": "curly bracket",
        "One. Two. Three.\nlorem ipsum": "lorem ipsum",
    }
    for text, rule in cases.items():
        found = filters.verdict(text)
        assert (found and found[0]) == rule


@pytest.mark.parametrize(
    "line, sentences",
    [
        ("One two three four five.", 1),
        ("One two. Three four five.", 2),
        ("Dr. Smith came. He saw Mr. J. Jones (of Fig. 3).", 2),
        ("It cost 3.50 at 5 p.m. on Monday.", 1),
        ('"Really?" she said. "Yes!" He left.', 3),
        ("Wait... what is this? Nothing!", 2),
        (
            "A page in Chinese has long words. " * 2 + "中" * 300_000 + " end.",
            3,
        ),  # minutes with a regex
    ],
    ids=lambda value: str(value)[:20],
)
def test_sentences(line: str, sentences: int) -> None:
    assert count_sentences(line) == sentences
