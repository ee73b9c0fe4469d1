"""Duplicates: recall and precision by similarity on planted pairs, order, bounded buckets, the parts of a join."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data_prep.cli import main
from data_prep.config.schema import DedupConfig
from data_prep.shards.format import Manifest
from data_prep.stages import near as near_duplicates
from data_prep.stages import signatures as sign
from data_prep.stages.dedup_task import DedupTask
from data_prep.stages.exact import repeats
from data_prep.stages.near import HISTOGRAM_BINS, candidate_pairs
from data_prep.stages.selection import Selection
from data_prep.stages.signatures import band_shape, shingle_hashes, signatures, similarity
from data_prep.work.parts import Part
from tests.data_prep.conftest import c4_line, write_dump
from tests.data_prep.outcome import decoded
from tests.data_prep.raw_corpus import SAMPLE

WORDS_5 = 5
BINS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(WORDS_5)), strict=False))


def jaccard(first: str, second: str) -> float:
    a, b = ngrams(first), ngrams(second)
    return len(a & b) / len(a | b)


def variant(text: str, target: float, rng: random.Random) -> str:
    """The text with words changed at random until its similarity is just above `target`."""
    words = text.split(" ")
    result = text
    for position in rng.sample(range(len(words)), len(words)):
        kept = words[position]
        words[position] = f"w{rng.randrange(10**9)}"
        changed = " ".join(words)
        if jaccard(text, changed) < target:
            words[position] = kept
            break
        result = changed
    return result


def originals(count: int) -> list[str]:
    """Texts that have at most a few 5-grams in common: windows of the sample without overlap."""
    windows: list[str] = []
    for path in sorted(SAMPLE.glob("*/*train*.json.gz")):
        with gzip.open(path) as stream:
            for line in stream:
                words = json.loads(line)["text"].split(" ")
                windows += [" ".join(words[start : start + 150]) for start in range(0, len(words) - 150, 150)]
                if len(windows) >= count:
                    return windows[:count]
    raise AssertionError(f"the sample has {len(windows)} windows, not {count}")


def plant(pairs: int, alone: int, *, seed: int) -> tuple[list[str], dict[int, tuple[int, float]]]:
    """Documents, and for each planted near-copy (its original, their exact similarity); copies come later."""
    rng = random.Random(seed)
    texts = originals(pairs + alone)
    planted = {}
    for number in range(pairs):
        target = BINS[number % (len(BINS) - 1)] + 0.05 * rng.random()
        copy = variant(texts[number], min(target, 1.0), rng)
        planted[len(texts)] = (number, jaccard(texts[number], copy))
        texts.append(copy)
    return texts, planted


def run_dedup(folder: Path, files: list[list[str]], *, validation_fraction: float = 0.0, **settings: Any) -> list[str]:
    """The documents that are left of some files, in train."""
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(files):
        write_dump(folder / f"c4-{number:03d}.json.gz", [c4_line(text) for text in texts])
    body = {
        "input": f"{folder}/c4-*.json.gz",
        "validation_fraction": validation_fraction,
        "output": str(folder / "out"),
        "workers": 1,
        "dedup": {"memory_bytes": 1_048_576, **settings},
        "tokenizer": {"vocab_size": 400, "sample_bytes": 50_000},
    }
    (folder / "config.json").write_text(json.dumps(body))
    assert main(["run", "--config", str(folder / "config.json")]) == 0
    return decoded(Manifest.load(folder / "out"), "train")


def recall_and_precision(folder: Path, pairs: int, alone: int, *, seed: int) -> tuple[dict[float, list[bool]], float]:
    """Whether each planted copy was removed, by bin of similarity, and the share of removed documents that were
    planted."""
    texts, planted = plant(pairs, alone, seed=seed)
    quarter = len(texts) // 4
    left = Counter(run_dedup(folder, [texts[start : start + quarter] for start in range(0, len(texts), quarter)]))
    removed = set()
    for number, text in enumerate(texts):  # the first of equal texts uses up the one that is left
        if left[text] == 0:
            removed.add(number)
        left[text] -= left[text] > 0
    bins: dict[float, list[bool]] = {low: [] for low in BINS}
    for number, (_, exact) in planted.items():
        bins[max(low for low in BINS if low <= exact + 1e-9)].append(number in removed)
    return bins, len(removed & planted.keys()) / max(1, len(removed))


@pytest.mark.parametrize(
    "pairs, alone", [(300, 300), pytest.param(3000, 3000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_planted_near_duplicates(tmp_path: Path, pairs: int, alone: int, capsys: pytest.CaptureFixture[str]) -> None:
    bins, precision = recall_and_precision(tmp_path, pairs, alone, seed=1)
    capsys.readouterr()
    print(f"\nprecision {precision:.4f}")
    for low, found in bins.items():
        if found:
            print(f"similarity from {low:.2f}: {sum(found)} of {len(found)} removed, {sum(found) / len(found):.3f}")
    above = [hit for low, found in bins.items() if low >= 0.9 for hit in found]
    assert len(above) >= pairs // 4
    assert sum(above) / len(above) >= 0.95
    assert precision > 0.99
    below = [hit for low, found in bins.items() if low <= 0.7 for hit in found]
    assert sum(below) / len(below) < 0.1  # the threshold is 0.8: what is clearly below it stays


def test_the_first_in_reading_order_stays_across_files_and_splits(tmp_path: Path) -> None:
    texts = originals(6)
    rng = random.Random(0)
    near = variant(texts[2], 0.93, rng)
    files = [[texts[0], near], [texts[1], texts[2], texts[0]], [variant(texts[1], 0.93, rng), texts[3], texts[3]]]
    assert run_dedup(tmp_path, files) == [texts[0], near, texts[1], texts[3]]
    _check_the_account(
        tmp_path / "out", files, exact=[((1, 2), (0, 0)), ((2, 2), (2, 1))], near=[((1, 1), (0, 1)), ((2, 0), (1, 0))]
    )
    assert run_dedup(tmp_path / "exact", files, near=False) == [
        texts[0],
        near,
        texts[1],
        texts[2],
        files[2][0],
        texts[3],
    ]


def _check_the_account(out: Path, files: list[list[str]], **dropped: list[tuple[tuple[int, int], ...]]) -> None:
    """Counts and examples name each dropped document (file, position) and the kept one that it repeats."""
    lines = [json.loads(line) for line in (out / "duplicate_samples.jsonl").read_text().splitlines()]
    bins = [0] * HISTOGRAM_BINS
    for kind, places in dropped.items():
        for pair in places:
            line = lines.pop(0)
            assert line["kind"] == kind
            for prefix, (file, position) in zip(("", "kept_"), pair, strict=True):
                assert line[f"{prefix}file"].endswith(f"c4-{file:03d}.json.gz")
                assert line[f"{prefix}position"] == position + 1  # lines are counted from 1
                assert line[f"{prefix}excerpt"] == files[file][position][:200]
            if kind == "near":
                first, second = (files[file][position] for file, position in pair)
                assert line["similarity"] == pytest.approx(jaccard(first, second), abs=0.06)
                bins[int(line["similarity"] * len(bins))] += 1
    assert not lines
    counts = Manifest.load(out).provenance.dropped["duplicates"]
    assert counts == {**{kind: len(places) for kind, places in dropped.items()}, "near_similarity": bins}


def test_a_similarity_at_the_threshold_itself_is_enough(tmp_path: Path) -> None:
    texts = originals(2)
    changed = variant(texts[0], 0.9, random.Random(0))
    assert run_dedup(tmp_path, [[*texts, texts[0].upper(), changed]], threshold=1.0) == [*texts, changed]


def test_validation_holds_nothing_that_resembles_train(tmp_path: Path) -> None:
    """By a hash of the text, a copy with a word changed goes to the other split half of the time."""
    rng = random.Random(2)
    texts = originals(24)
    copies = [variant(text, 0.93, rng) for text in texts]
    train = run_dedup(tmp_path, [texts, copies], validation_fraction=0.5)
    validation = decoded(Manifest.load(tmp_path / "out"), "validation")
    assert sorted(train + validation) == sorted(texts) and min(len(train), len(validation)) > 4
    alone = run_dedup(tmp_path / "exact", [texts, copies], validation_fraction=0.5, near=False)
    pairs = [{text, copy} for text, copy in zip(texts, copies, strict=True)]
    assert sum(len(pair & set(alone)) == 1 for pair in pairs) > 4, "without it they are on both sides"


def test_a_chain_of_resemblance_drops_only_what_resembles_a_kept_document(tmp_path: Path) -> None:
    words = originals(1)[0].split(" ") * 2
    chain = []
    for link in range(5):
        start = 60 * link
        chain.append(" ".join((words[:start] and [f"x{n}" for n in range(start)] + words[start:]) or words))
    values = [jaccard(chain[0], text) for text in chain]
    assert values[1] < 0.8  # each link is far from the one before it: all stay
    assert run_dedup(tmp_path, [chain]) == [text for n, text in enumerate(chain) if n == 0 or values[n] < 0.8]


def test_what_resembles_a_dropped_document_alone_stays_and_what_resembles_two_is_dropped_once(tmp_path: Path) -> None:
    rng = random.Random(3)
    (first,) = originals(1)
    middle = variant(first, 0.86, rng)
    last = variant(middle, 0.86, rng)
    assert jaccard(first, last) < 0.77 < 0.8 < jaccard(first, middle)  # 0.8 is the threshold
    for name, files, pair in (
        ("chain", [[first, middle, last]], ((0, 1), (0, 0))),
        ("two", [[first, last, middle]], ((0, 2), (0, 0))),
    ):
        assert run_dedup(tmp_path / name, files) == [first, last]
        _check_the_account(tmp_path / name / "out", files, exact=[], near=[pair])


def test_large_buckets_cost_linear_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BUCKET_COMPARISONS", 3)
    rows = np.array([[7, d] for d in range(50)] + [[8, 50], [9, 51], [9, 60]], np.uint64)
    whole = np.concatenate(list(candidate_pairs([rows])))
    assert len(whole) == 0 + 1 + 2 + 3 * 47 + 1
    assert (whole[:, 0] > whole[:, 1]).all()
    for cut in range(1, len(rows)):
        pieces = np.concatenate(list(candidate_pairs([rows[:cut], rows[cut:]])))
        assert sorted(map(tuple, pieces.tolist())) == sorted(map(tuple, whole.tolist()))


def test_equal_rows_are_joined_however_the_sort_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and in two blocks cut at every place, against a dict of the first document of each hash."""
    monkeypatch.setattr(near_duplicates, "PAIRS_PER_BATCH", 4)
    hashes = [(1, 5)] * 3 + [(1, 6)] + [(2, 5)] * 2 + [(2, 7), (3, 7)] + [(9, 9)] * 4
    rows = np.array([(*both, 10 + number) for number, both in enumerate(hashes)], np.uint64)
    pairs = rows[:, :2]
    first: dict[tuple[int, int], int] = {}
    wanted = [(10 + n, 10 + first[both]) for n, both in enumerate(hashes) if first.setdefault(both, n) != n]
    for cut in range(1, len(rows) + 1):
        blocks = [slice(0, cut)] + [slice(cut, None)] * (cut < len(rows))
        found = np.concatenate(list(repeats(rows[block] for block in blocks)))
        assert list(map(tuple, found.tolist())) == wanted
        batches = list(near_duplicates.once_each(pairs[block] for block in blocks))
        assert list(map(tuple, np.concatenate(batches).tolist())) == sorted(set(hashes))
        assert max(map(len, batches)) <= 4


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_candidates_at_the_threshold(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert bands * rows <= 256
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


def test_what_agrees_by_chance_is_no_similarity() -> None:
    """One byte of 256 does between documents that have nothing in common."""
    some = np.arange(256, dtype=np.uint8)
    others = np.stack([np.where(some < agree, some, some + 1) for agree in (0, 1, 129, 256)]).astype(np.uint8)
    assert similarity(np.stack([some] * 4), others).tolist() == pytest.approx([0, 0, 128 / 255, 1])


def test_similarity_is_an_unbiased_estimate() -> None:
    rng = random.Random(5)
    texts, planted = plant(120, 0, seed=2)
    _, digests = signatures(texts, WORDS_5)
    low = digests.astype(np.uint8)
    errors = [similarity(low[[a]], low[[b]])[0] - exact for b, (a, exact) in planted.items()]
    assert abs(np.mean(errors)) < 0.006
    assert np.std(errors) < 0.03
    assert rng  # signatures depend on nothing random


def test_shingles_depend_on_their_words_and_not_on_the_neighbours() -> None:
    words = np.arange(10, 30, dtype=np.uint64)
    together, offsets = shingle_hashes(words, np.array([3, 7, 1, 9]), 4)
    assert offsets.tolist() == [0, 1, 5, 6, 12]
    start = 0
    for number, count in enumerate((3, 7, 1, 9)):
        alone, _ = shingle_hashes(words[start : start + count], np.array([count]), 4)
        np.testing.assert_array_equal(together[int(offsets[number]) : int(offsets[number + 1])], alone)
        start += count
    assert len(set(together.tolist())) == len(together)


def test_short_documents_are_signed_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16,000 documents of 4 words are one batch of BATCH_CHARACTERS, whose values as Python numbers took 150 MB."""
    sizes: list[int] = []
    real = sign.signatures

    def noted(texts: list[str], shingle_words: int) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(texts))
        return real(texts, shingle_words)

    monkeypatch.setattr(sign, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(sign, "signatures", noted)
    texts = [f"{number} one two three" for number in range(10)]
    assert run_dedup(tmp_path, [texts, originals(1)]) == [*texts, *originals(1)]
    assert sizes == [4, 4, 3]  # both files, small as they are, share a part


class CountedParts(tuple[Part, ...]):
    """Parts that count how often somebody goes through all of them."""

    passes = 0

    def __iter__(self) -> Iterator[Part]:
        self.passes += 1
        return super().__iter__()


def test_pairs_over_many_parts_do_not_go_through_all_parts_for_each(tmp_path: Path) -> None:
    """C4 has 25,000 parts, and a batch of pairs has documents in most of them."""
    rows = np.random.default_rng(5).integers(0, 2, size=(40, 3, sign.PERMUTATIONS), dtype=np.uint8)
    parts = CountedParts(Part(name=f"p{n}", documents=3, bytes=9, split="train") for n in range(len(rows)))
    for part, of_part in zip(parts, rows, strict=True):
        (tmp_path / f"{part.name}.sig").write_bytes(of_part.tobytes())
    task = DedupTask(
        config=DedupConfig(),
        parts=parts,
        selection=Selection(ingest=tmp_path),
        signatures=tmp_path,
        folder=tmp_path,
    )
    pairs = np.array([(119 - n, n) for n in range(60)], np.uint64)
    parts.passes = 0
    found = near_duplicates.similarities(task, pairs)
    flat = rows.reshape(-1, sign.PERMUTATIONS)
    wanted = [
        max(0.0, (sum(a == b for a, b in zip(flat[x], flat[y], strict=True)) - 1) / 255) for x, y in pairs.tolist()
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert parts.passes <= 1


def test_signatures_that_are_cut_off_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.sig").write_bytes(bytes(3 * sign.PERMUTATIONS - 1))
    part = Part(name="p", documents=3, bytes=9, split="train")
    assert sign.read_low_bytes(tmp_path, part, np.array([1])).tolist() == [[0] * sign.PERMUTATIONS]
    with pytest.raises(DataError, match="damaged after it was written"):
        sign.read_low_bytes(tmp_path, part, np.array([0, 2]))


def test_documents_without_words_and_signatures_of_batches(tmp_path: Path) -> None:
    signed, digests = signatures(["", "!!! ???", "one", "One.", "a b c d e f"], WORDS_5)
    assert signed.tolist() == [2, 3, 4]
    np.testing.assert_array_equal(digests[0], digests[1])
    assert run_dedup(tmp_path, [["!!! ???", "... ---", "one two", "One, two!", originals(1)[0]]]) == [
        "!!! ???", "... ---", "one two", originals(1)[0],
    ]  # fmt: skip


def shingle_hash_of(words: list[int]) -> int:
    """The definition in whole numbers: h becomes splitmix64(h + word + place + 1) word by word, modulo 2^64."""
    found = 0
    for place, word in enumerate(words):
        found = (found + word + place + 1 + 0x9E3779B97F4A7C15) % 2**64
        found = (found ^ (found >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        found = (found ^ (found >> 27)) * 0x94D049BB133111EB % 2**64
        found ^= found >> 31
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 50])
@pytest.mark.parametrize(
    "counts",
    [[1], [2], [3], [4], [5], [6], [7], [1, 1], [2, 1], [1, 2, 1], [5, 5], [4, 6, 1], [49], [50], [51], [50, 3, 52]],
)
def test_shingles_are_those_of_the_definition_however_few_words_there_are(n: int, counts: list[int]) -> None:
    """2 and 3 words in all ended in a traceback with n = 5: a negative slice."""
    words = np.random.default_rng(n).integers(0, 2**64, sum(counts), np.uint64)
    expected, offsets = [], [0]
    rest = words.tolist()
    for count in counts:
        document, rest = rest[:count], rest[count:]
        whole = [document[start : start + n] for start in range(count - n + 1)] or [document + [0] * (n - count)]
        expected += [shingle_hash_of(ngram) for ngram in whole]
        offsets.append(len(expected))
    hashes, found = shingle_hashes(words, np.array(counts), n)
    assert hashes.tolist() == expected and found.tolist() == offsets


def test_the_words_of_an_ngram_are_those_of_the_key(tmp_path: Path) -> None:
    """The same words in another order: alike by single words alone."""
    text = originals(1)[0]
    other = " ".join(sorted(text.split(" ")))
    assert run_dedup(tmp_path / "five", [[text, other]]) == [text, other]
    assert run_dedup(tmp_path / "one", [[text, other]], shingle_words=1) == [text]


def test_a_raw_file_of_a_few_words_goes_through(tmp_path: Path) -> None:
    """Other numbers of words: test_shingles_are_those_of_the_definition_however_few_words_there_are."""
    assert run_dedup(tmp_path, [["?", "Hello you"], [originals(1)[0], "Hello you"]]) == [
        "?",
        "Hello you",
        originals(1)[0],
    ]
