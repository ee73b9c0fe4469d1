"""Every rule: a text that it drops, the same text mended, and the reason."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.config.schema import FilterConfig
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.run.up_to_date import changed_text
from data_prep.shards.format import Manifest
from data_prep.stages.c4_rules import clean_page
from data_prep.stages.filter import FilterTask, summary
from data_prep.stages.filters import (
    RULES,
    Filters,
    LanguageIdentifier,
    _repeated_spans,
    _top_ngram,
    gopher_repetition,
    plain_newlines,
)
from data_prep.stages.tokenizer import train_tokenizer
from data_prep.work.parts import Part
from tests.data_prep.conftest import c4_line, write_dump
from tests.data_prep.outcome import decoded
from tests.data_prep.raw_corpus import GERMAN, SAMPLE, sample_texts

GOOD = sample_texts(1)[0]
SENTENCES = [sentence.strip() + "." for text in sample_texts(8) for sentence in text.replace("\n", " ").split(". ")]
NO_STOP_WORDS = (
    "Many people walk along this river every morning because birds sing there. Some bring bread, others only sit on a "
    "bench under old trees, where it is quiet. Nobody knows how long it will stay so. "
) * 2


def verdict(text: str, **settings: object) -> str | None:
    found = Filters(FilterConfig.model_validate({"c4": True, **settings})).verdict(text)
    return None if found is None else found[0]


@pytest.mark.parametrize(
    "text, rule",
    [
        (" ".join(GOOD.split()[:49]), "too few words"),
        (GOOD * 60, "too many words"),
        (GOOD + " Lorem Ipsum dolor.", "lorem ipsum"),
        (GOOD + " { x }", "curly bracket"),
        (GOOD.replace(".", ",").replace("?", ",").replace("!", ","), "too few sentences"),
        (" ".join("a." for _ in range(80)), "word length"),
        (" ".join(word + " #" * (number % 4 == 0) for number, word in enumerate(GOOD.split())), "symbols"),
        ("\n".join("- " + sentence for sentence in SENTENCES[:30]), "bullet lines"),
        ("\n".join(sentence + ".." for sentence in SENTENCES[:30]), "ellipsis lines"),
        (" 12345, ".join(GOOD.split()), "words without letters"),
        (" ".join(f"Wort{n}xyz." for n in range(90)), "stop words"),
        ("\n".join(SENTENCES[:20] + SENTENCES[:1] * 12), "repeated lines"),
        ("\n".join([*SENTENCES[:12], *(" ".join(SENTENCES[:6]),) * 3]), "repeated line characters"),
        ("\n\n".join(SENTENCES[:20] + SENTENCES[:1] * 12).replace(". ", ".\n1"), "repeated paragraphs"),
        (" ".join(s + " the cat the cat the cat the cat the cat the cat" for s in SENTENCES[:20]), "top 2-gram"),
        (" ".join([*SENTENCES[:20], *SENTENCES[2:9]]), "repeated 5-grams"),
    ],
)  # fmt: skip
def test_a_rule_names_itself(text: str, rule: str) -> None:
    found = verdict(text, max_words=30_000)
    if rule == "repeated paragraphs":  # lines repeat too, and that rule comes first
        assert found in ("repeated lines", "repeated paragraphs")
    else:
        assert found == rule
    assert rule in RULES


def test_good_text_passes_and_every_switch_works() -> None:
    assert verdict(GOOD) is None
    assert verdict(GOOD, language="en") is None
    assert verdict(GERMAN * 3, language=["en", "fr"]) == "language"
    assert verdict(GERMAN * 3, language=["de"], gopher_quality=False, gopher_repetition=False) is None
    assert verdict(GOOD + " { x }", c4=False) is None
    assert verdict("- word\n" * 100, c4=False, gopher_quality=False, gopher_repetition=False) is None
    assert verdict("word", c4=False, gopher_quality=False, min_words=0) is None
    two = " ".join(SENTENCES[:2])
    assert verdict(two, min_words=0) == "too few sentences"
    assert verdict(two, min_words=0, c4_min_sentences=2) is None
    assert verdict(two, min_words=0, c4_min_sentences=4) == "too few sentences"
    mixed = GERMAN[:100] + GOOD
    assert verdict(mixed, language="en", language_characters=5000) is None
    assert verdict(mixed, language="en", language_characters=100) == "language"
    assert verdict("", c4=False, gopher_quality=False, min_words=0) == "too few words"  # c4_lines left nothing


def lines_of(words: list[str], count: int) -> list[str]:
    """The words in `count` lines."""
    each = len(words) // count
    return [" ".join(words[start : start + each]) for start in range(0, len(words), each)]


def test_a_limit_itself_is_allowed() -> None:
    """100 words of five letters in ten lines, at each limit and one beyond it."""
    words = ["there", "where", *(f"wo{number:02}d" for number in range(96)), "the", "and"]
    without_letters = ["12345"] * 20 + words[20:]
    lines = lines_of(words, 10)
    short, long = [f"a{number:03}" for number in range(6)], [f"{number:030}" for number in range(4)]
    cases: list[tuple[str, str | None, dict[str, object]]] = [
        (" ".join(words), None, {"min_words": 100, "max_words": 100}),
        (" ".join(words), "too few words", {"min_words": 101}),
        (" ".join(words), "too many words", {"max_words": 99}),
        (" ".join(words).replace("wo0", "#o0"), None, {}),
        (" ".join(words).replace("wo0", "#o0").replace("wo11", "#o11"), "symbols", {}),
        (" ".join(words).replace("wo0", "#o0").replace("wo1", "…o1"), None, {}),  # the more frequent one counts
        ("\n".join([*(f"- {line}" for line in lines[:9]), lines[9]]), None, {}),
        ("\n".join(f"- {line}" for line in lines), "bullet lines", {}),
        ("\n".join([*(f"{line}..." for line in lines[:3]), *lines[3:]]), None, {}),
        ("\n".join([*(f"{line}..." for line in lines[:4]), *lines[4:]]), "ellipsis lines", {}),
        (" ".join(without_letters), None, {}),
        (" ".join(["12345", *without_letters[:20], *without_letters[21:]]), "words without letters", {}),
    ]
    for text, rule, keys in cases:
        assert verdict(text, c4=False, gopher_repetition=False, **keys) == rule, text
    repeated: list[tuple[list[str], str | None]] = [
        ([*short[:3], *short[:3], *long], None),  # 3 of 10 lines, 12 of 144 characters
        ([*short[:4], *short[:4], *long[:2]], "repeated lines"),
        ([*lines[:5], lines[0][:40], lines[0][:40]], None),  # 40 of 40 + 40 + 5 x 59 characters, which is a tenth
        ([*long, *short, long[0]], None),  # 30 of 174, and of 144 without it
        ([*long, *short[:5], 2 * long[0], 2 * long[0]], "repeated line characters"),
    ]
    for of_text, rule in repeated:
        text = "\n".join(of_text)
        found = gopher_repetition(text, [f"w{number}" for number in range(50)])
        assert (found and found[0]) == rule, text


def test_stop_words_are_asked_of_english_alone() -> None:
    """Of every document where no language is named, as published; the preparation of other languages lost them all."""
    without = [(text, {"c4": False, "gopher_repetition": False}) for text in (GERMAN * 3, NO_STOP_WORDS)]
    assert [verdict(text, **keys) for text, keys in without] == ["stop words", "stop words"]
    assert [verdict(text, language=["de", "en"], **keys) for text, keys in without] == [None, "stop words"]
    assert verdict(GERMAN * 3 + "# " * 20, language="de", c4=False) == "symbols", "the other rules stay"
    # What was made when they were asked of all is made again; nothing else is.
    recorded = {language: FilterConfig(language=(language,)).settings().get("stop_words") for language in ("en", "de")}
    assert recorded == {"en": None, "de": "en"} and "stop_words" not in FilterConfig().settings()
    assert "stop_words" not in FilterConfig(language=("de",), gopher_quality=False).settings()


def test_data_that_were_asked_for_english_stop_words_in_all_languages_are_told_from_others() -> None:
    """By a key of the config, which what is recorded is none."""
    now = FilterConfig(language=("de",)).settings()
    then = {key: value for key, value in now.items() if key != "stop_words"}
    said = "`filter.gopher_quality` asked every document for English stop words, now those in English alone"
    assert changed_text("filter", then, now) == said
    assert changed_text("filter", {**now, "min_words": 3}, now) == "`filter.min_words` was 3, is now 50"
    assert changed_text("filter", None, now).startswith("`filter` was null, is now {")


def test_filters_that_leave_nothing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dump(tmp_path / "a.json.gz", [c4_line(GERMAN * 3), c4_line(GERMAN * 4), c4_line("short")])
    body = {
        "input": str(tmp_path / "a.json.gz"),
        "output": str(tmp_path / "out"),
        "filter": {"c4": False},
        "dedup": None,
        "workers": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(body))
    model = tmp_path / "m.model"
    for more in ([], ["--set", f"tokenizer.model={model}"]):
        if more:
            texts = iter([GOOD, GERMAN])
            model.write_bytes(train_tokenizer(texts, TokenizerConfig(vocab_size=340)))
        assert main(["run", "--config", str(tmp_path / "config.json"), *more]) == 2
        said = "error: filter: every document was dropped (stop words 2, too few words 1); its rules are for English"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "repeated, times, rule",
    [
        (2, 21, "top 2-gram"), (2, 19, None), (3, 13, "top 3-gram"), (3, 11, None), (4, 9, "top 4-gram"), (4, 7, None),
        (31, 2, "repeated 5-grams"), (29, 2, "repeated 6-grams"), (27, 2, "repeated 7-grams"),
        (25, 2, "repeated 8-grams"), (23, 2, "repeated 9-grams"), (21, 2, "repeated 10-grams"), (19, 2, None),
    ],
)  # fmt: skip
def test_shares_of_ngrams_are_those_of_gophers_table(repeated: int, times: int, rule: str | None) -> None:
    """Of 200 words of one length, `repeated` stand `times` times, with another word between. The most frequent n-gram
    may take 20%, 18% and 16% (n = 2, 3, 4), n-grams that occurred before 15%, 14%, ... 10% (n = 5, 6, ... 10)."""
    others = iter(f"w{number:03}" for number in range(200))
    again = [f"r{number:03}" for number in range(repeated)]
    words = [word for _ in range(times) for word in [*again, next(others)]]
    words += [next(others) for _ in range(200 - len(words))]
    found = gopher_repetition(" ".join(words), words)
    assert (found and found[0]) == rule


def test_repeated_spans_are_the_words_of_ngrams_seen_before() -> None:
    words = ["a", "b", "c", "d", "e", "x", "a", "b", "c", "d", "e", "f", "a", "b", "c", "d", "e", "f"]
    for n in range(1, 8):
        expected = set()
        for start in range(len(words) - n + 1):
            if any(words[earlier : earlier + n] == words[start : start + n] for earlier in range(start)):
                expected |= set(range(start, start + n))
        spans = list(_repeated_spans(words, n))
        found = [position for start, stop in spans for position in range(start, stop)]
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_most_frequent_ngram_covers_no_character_twice(n: int) -> None:
    """Against sets of positions; occurrences that overlap gave shares of 150% and more."""
    rng = random.Random(n)
    texts = [["a"] * 50, ["ab", "c"] * 20, ["a", "b", "a", "b", "a"], ["x"]]
    texts += [rng.choices(["a", "bb", "ccc"], k=rng.randint(1, 40)) for _ in range(300)]
    for words in texts:
        places: dict[tuple[str, ...], list[int]] = {}
        for start in range(len(words) - n + 1):
            places.setdefault(tuple(words[start : start + n]), []).append(start)
        most = max(map(len, places.values()), default=0)
        shares = [
            sum(len(words[position]) for position in {start + k for start in starts for k in range(n)})
            for starts in places.values()
            if len(starts) == most > 1
        ]
        assert _top_ngram(words, n) == max(shares, default=0) <= sum(map(len, words))


@pytest.mark.parametrize(
    "text", ["word " * 200, "a b " * 100, "spam, spam, spam and spam. " * 40, "x\n" * 300, "y\r\n\r\n" * 90]
)
def test_no_share_passes_the_whole(text: str) -> None:
    for quality in (False, True):
        found = Filters(FilterConfig(c4=False, gopher_quality=quality, min_words=1)).verdict(text)
        assert found is not None
        assert all(int(share) <= 100 for share in re.findall(r"(\d+)%", found[1])), found


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
@pytest.mark.parametrize(
    "lines",
    [
        ["A first line that stands here.", "", "A paragraph comes twice.", "It has two lines.", ""] * 12,
        [f"{number} is a line.\n\nIt comes in a paragraph" for number in range(9)] * 2,
        ["- a point", "- another one", "and this..."] * 30,
        ["a", "", "b"],
    ],
)
def test_a_text_from_windows_gets_the_same_verdict(lines: list[str], newline: str) -> None:
    text = "\n".join(lines)
    for settings in ({}, {"gopher_quality": False}, {"gopher_quality": False, "gopher_repetition": False}):
        filters = Filters(FilterConfig.model_validate({"min_words": 1, **settings}))
        assert filters.verdict(text.replace("\n", newline)) == filters.verdict(text)
    assert plain_newlines(text.replace("\n", newline)) == text


def test_paragraphs_of_a_text_from_windows_repeat() -> None:
    """One short paragraph five times among six of ten lines: 36% of the paragraphs and 6% of the lines."""
    long = ["\r\n".join(f"{number}{line} {SENTENCES[line]}" for line in range(10)) for number in range(6)]
    text = "\r\n\r\n".join([*long, *["And so on."] * 5])
    for variant in (text, text.replace("\r\n", "\n"), text.replace("\r\n", "\r")):
        assert verdict(variant, c4=False, gopher_quality=False, min_words=1) == "repeated paragraphs"


def test_line_rules_drop_lines_and_nothing_else() -> None:
    gone = ("Menu", "Two words.", "Please enable JavaScript to go on.", "The end of it...", " Is it so, then?[1]")
    page = clean_page("\n".join(["A whole sentence is here.", *gone]))
    assert page.text == "A whole sentence is here."
    assert page.dropped == gone


def test_the_sample_mostly_passes() -> None:
    """Prose of manuals and novels: rules that drop much of it would be wrong."""
    filters = Filters(FilterConfig(language=("en",), c4=False))
    with gzip.open(SAMPLE / "c4" / "c4-validation.00000-of-00001.json.gz") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    reasons = Counter(found[0] for found in map(filters.verdict, texts) if found)
    assert sum(reasons.values()) <= 0.1 * len(texts), reasons


@pytest.mark.parametrize(
    "text, code",
    [
        ("The train to Hamburg leaves later today because of a fault, and nobody knows when.", "en"),
        (GERMAN, "de"),
        ("Le train pour Hambourg partira plus tard aujourd'hui, et personne ne sait quand.", "fr"),
        ("El tren a Hamburgo saldrá hoy más tarde por una avería, y nadie sabe cuándo.", "es"),
        ("Поезд на Гамбург сегодня отправится позже, и никто не знает когда.", "ru"),
        ("由于故障，今天开往汉堡的列车将晚点发车，没有人知道什么时候。", "zh"),
    ],
)
def test_languages(text: str, code: str) -> None:
    assert LanguageIdentifier(500)(text) == code


def test_line_rules_change_documents_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the dump to the shards: text without these lines, of which the manifest has the number, and examples."""
    whole = [f"Number {number} is a whole sentence. " * 20 for number in range(4)]
    texts = [f"Menu {number}\n{text}\nAll rights\n\nThe end is here now.[1]" for number, text in enumerate(whole)]
    write_dump(tmp_path / "a.json.gz", [c4_line(text) for text in [*texts, "Menu\nHome", whole[0].strip()]])
    rules = {"min_words": 0, "gopher_quality": False, "gopher_repetition": False, "c4": False, "c4_lines": True}
    body = {
        "input": str(tmp_path / "a.json.gz"),
        "output": str(tmp_path / "out"),
        "workers": 1,
        "validation_fraction": 0.0,
        "filter": {**rules, "samples": 2},
        "tokenizer": {"vocab_size": 290},
    }
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert main(["run", "--config", str(tmp_path / "config.json")]) == 0
    manifest = Manifest.load(tmp_path / "out")
    left = [f"{text.strip()}\nThe end is here now." for text in whole] + [whole[0].strip()]
    assert decoded(manifest, "train") == left
    assert manifest.totals["train"].text_bytes == sum(map(len, left))
    assert manifest.provenance.dropped == {"filtered": {"too few words": 1}, "lines": 4 * 3 + 2}
    assert "filter.c4_lines dropped: 14" in capsys.readouterr().out
    samples = [json.loads(line) for line in (tmp_path / "out" / "filter_samples.jsonl").read_text().splitlines()]
    assert [line["rule"] for line in samples] == ["too few words", "c4 lines", "c4 lines"]
    assert {line["excerpt"].splitlines()[0].split()[0] for line in samples} == {"Menu"}
    assert samples[1]["detail"] in ("3 of 5 lines", "2 of 2 lines")


def test_an_unknown_language_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dump(tmp_path / "a.json.gz", [c4_line(GOOD)])
    body = {
        "input": str(tmp_path / "a.json.gz"),
        "output": str(tmp_path / "out"),
        "filter": {"language": ["en", "eng"]},
    }
    (tmp_path / "config.json").write_text(json.dumps({**body, "workers": 1}))
    assert main(["run", "--config", str(tmp_path / "config.json")]) == 2
    assert "filter.language: no 'eng'; py3langid knows" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/.work/ingest-*/*"))


def test_what_the_parts_lost_is_summed_and_the_examples_are_of_all(tmp_path: Path) -> None:
    """Those with the smallest hash, whatever the order of the work."""
    tasks = []
    for number, keys in enumerate(((7, 2), (9, 1))):
        part = Part(name=f"part-{number}", documents=8, bytes=80, split="train")
        body = {"counts": {RULES[0]: 1 + number, RULES[1]: 1}, "lines": 3 + number}
        samples = {RULES[1]: [[key, {"hash": key}] for key in keys]}
        (tmp_path / f"{part.name}.json").write_text(json.dumps({**body, "samples": samples}))
        config = FilterConfig(samples=2)
        tasks.append(FilterTask(config=config, part=part, ingest=tmp_path, folder=tmp_path))
    for order in (tasks, tasks[::-1]):
        found = summary(order)
        assert found.counts == {RULES[0]: 3, RULES[1]: 2} and found.lines == 7
        assert found.samples == [{"hash": 1}, {"hash": 2}]
