"""The pieces of the removal of duplicates: kills, workers, and work folders of earlier code change no row.

The rows are those of a reference in plain Python, which knows no files, sorts or pieces.
"""

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from data_prep.config.schema import DedupConfig
from data_prep.stages import dedup, exact, external_sort, near
from data_prep.stages.dedup import find_duplicates
from data_prep.stages.dedup_task import DedupTask, divided
from data_prep.stages.selection import EXACT, NEAR, Selection
from data_prep.stages.signatures import PERMUTATIONS, band_hashes, band_shape
from data_prep.work.parallel import Workers, worker_pool
from data_prep.work.parts import Part

PARTS, PART_DOCUMENTS = 24, 25
THRESHOLD = 0.8
BANDS, ROWS = band_shape(THRESHOLD)
BUCKET_COMPARISONS = 8  # documented in near.py


@dataclass(frozen=True)
class Corpus:
    """Documents without text: what ingest, filter and sign leave of them."""

    folder: Path
    values: np.ndarray
    """uint32 [documents, 256]: MinHash signatures."""
    hashes: list[tuple[int, int]]
    """Of the texts."""
    filtered: set[int]
    wordless: set[int]

    def task(self, folder: Path) -> DedupTask:
        folder.mkdir(exist_ok=True)
        return DedupTask(
            config=DedupConfig(threshold=THRESHOLD, memory_bytes=1 << 20),
            parts=tuple(
                Part(name=f"p{number:02d}", documents=PART_DOCUMENTS, bytes=1000, split="train")
                for number in range(PARTS)
            ),
            selection=Selection(ingest=self.folder / "ingest", filter=self.folder / "filter"),
            signatures=self.folder / "signatures",
            folder=folder,
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Copies of every degree, exact ones, and 40 near-copies of one document, which share buckets."""
    rng = np.random.default_rng(7)
    count = PARTS * PART_DOCUMENTS
    values = rng.integers(0, 2**32, (count, PERMUTATIONS), np.uint32)
    hashes = [(int(a), int(b)) for a, b in rng.integers(0, 2**64, (count, 2), np.uint64)]
    for document in range(1, count):
        source = 3 if document % 15 == 4 else int(rng.integers(document))
        chance = rng.random()
        if chance < 0.1:
            values[document], hashes[document] = values[source], hashes[source]
        elif chance < 0.6 or document % 15 == 4:
            keep = rng.random(PERMUTATIONS) < rng.uniform(0.6, 1)
            values[document] = np.where(keep, values[source], values[document])
    filtered = set(rng.choice(count, 20, replace=False).tolist())
    wordless = set(rng.choice(count, 10, replace=False).tolist())
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("ingest", "filter", "signatures"):
        (folder / name).mkdir()
    for number in range(PARTS):
        start, stop = number * PART_DOCUMENTS, (number + 1) * PART_DOCUMENTS
        signed = np.array([d for d in range(start, stop) if d not in filtered | wordless])
        low_bytes = np.zeros((PART_DOCUMENTS, PERMUTATIONS), np.uint8)
        low_bytes[signed - start] = values[signed].astype(np.uint8)
        (folder / "signatures" / f"p{number:02d}.sig").write_bytes(low_bytes.tobytes())
        rules = np.array([d in filtered for d in range(start, stop)], np.uint8)
        for kind, arrays in (
            ("ingest", {"hash": np.array(hashes[start:stop], np.uint64)}),
            ("filter", {"rule": rules}),
            ("signatures", {"document": signed - start, "bands": band_hashes(values[signed], BANDS, ROWS)}),
        ):
            safetensors.numpy.save_file(arrays, folder / kind / f"p{number:02d}.safetensors")
    return Corpus(folder, values, hashes, filtered, wordless)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shares and ranges, none of which ends where a part does, and sorts of many runs."""
    monkeypatch.setattr(exact, "SHARE_DOCUMENTS", 190)
    monkeypatch.setattr(near, "RANGE_DOCUMENTS", 70)
    monkeypatch.setattr(near, "PAIRS_PER_BATCH", 50)
    monkeypatch.setattr(external_sort, "RUN_SHARE", 1000)  # 65 pairs a run
    monkeypatch.setattr(external_sort, "MERGED_RUNS", 4)


Rows = list[tuple[int, ...]]


def reference(corpus: Corpus) -> tuple[Rows, Rows]:
    """(document, first of its text) and (document, kept one that it resembles, similarity in millionths)."""
    first: dict[tuple[int, int], int] = {}
    left = [d for d in range(len(corpus.values)) if d not in corpus.filtered]
    exact_rows: Rows = [(d, first[corpus.hashes[d]]) for d in left if first.setdefault(corpus.hashes[d], d) != d]
    signed = [d for d in left if d not in corpus.wordless and first[corpus.hashes[d]] == d]
    values = corpus.values.tolist()
    pairs = set()
    for band in range(BANDS):
        buckets: dict[tuple[int, ...], list[int]] = {}
        for document in signed:
            bucket = buckets.setdefault(tuple(values[document][band * ROWS : (band + 1) * ROWS]), [])
            pairs |= {(document, other) for other in bucket[:BUCKET_COMPARISONS]}
            bucket.append(document)
    near_rows: Rows = []
    dropped: set[int] = set()
    for document, other in sorted(pairs):
        if document in dropped or other in dropped:
            continue
        agree = sum(a % 256 == b % 256 for a, b in zip(values[document], values[other], strict=True))
        similar = max(0.0, (agree / 256 - 1 / 256) / (1 - 1 / 256))
        if similar >= THRESHOLD:
            dropped.add(document)
            near_rows.append((document, other, round(similar * 1e6)))
    return exact_rows, near_rows


def rows_of(path: Path, columns: int) -> Rows:
    return [tuple(row) for row in np.fromfile(path, np.uint64).reshape(-1, columns).tolist()]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process that nothing stopped, with pieces as large as for real corpora."""
    folder = tmp_path_factory.mktemp("undisturbed")
    find_duplicates(corpus.task(folder), Workers(1))
    return content(folder)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_rows_are_those_of_plain_python_whatever_the_number_of_workers(
    corpus: Corpus, undisturbed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    with worker_pool(workers) as pool:
        find_duplicates(corpus.task(tmp_path), pool)
    exact_rows, near_rows = reference(corpus)
    assert len(exact_rows) > 30 and len(near_rows) > 60
    assert rows_of(tmp_path / "exact.rows", 2) == exact_rows
    assert rows_of(tmp_path / "near.rows", 3) == near_rows
    verdicts = np.zeros((PARTS, PART_DOCUMENTS), np.uint8)
    for rows, verdict in ((exact_rows, EXACT), (near_rows, NEAR)):
        verdicts.flat[[row[0] for row in rows]] = verdict
    for number, expected in enumerate(verdicts):
        path = tmp_path / f"p{number:02d}.safetensors"
        assert path.exists() == expected.any()
        if path.exists():
            np.testing.assert_array_equal(safetensors.numpy.load_file(path)["verdict"], expected)
    done = json.loads((tmp_path / "done.json").read_text())
    assert (done["exact"], done["near"]) == (len(exact_rows), len(near_rows))
    assert content(tmp_path) == undisturbed, "and no intermediate file is left"


def in_child(function: Callable[[], Any]) -> int:
    """Calls the function in a process of its own; its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def start_and_kill(task: DedupTask, steps: int) -> int:
    """A start that is killed when it has renamed or removed a file, or is about to rename one, this many times."""
    left = steps

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    replace, unlink = os.replace, os.unlink

    def killing_replace(source: Any, target: Any) -> None:
        step()
        replace(source, target)
        step()

    def killing_unlink(path: Any, **options: Any) -> None:
        unlink(path, **options)
        step()

    def run() -> None:
        patch = pytest.MonkeyPatch()  # of the child alone
        patch.setattr(os, "replace", killing_replace)
        patch.setattr(os, "unlink", killing_unlink)
        find_duplicates(task, Workers(1))

    return in_child(run)


def test_killed_again_and_again_it_goes_on_from_what_is_finished(
    corpus: Corpus, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Before and after files get their names, while runs are merged, while intermediate files are removed."""
    task, rng = corpus.task(tmp_path / "killed"), random.Random(1)
    made: dict[str, int] = {}
    kills = 0
    while (code := start_and_kill(task, steps := rng.randint(1, 60))) != 0:
        assert code == -signal.SIGKILL, f"after {kills} kills, with {steps} steps"
        kills += 1
        finished = {
            path.name: path.stat().st_ino for path in task.folder.iterdir() if path.suffix in (".rows", ".safetensors")
        }
        again = [name for name in made.keys() & finished if made[name] != finished[name]]
        assert not again, f"made twice: {again}"
        made |= finished
    assert kills > 10
    assert {name for name in made if name.startswith("band-")} == {f"band-{n:05d}.rows" for n in range(BANDS)}
    assert content(task.folder) == undisturbed


def run_until(task: DedupTask, name: str) -> None:
    """Ends this process when a file has got this name."""
    replace = os.replace

    def killing_replace(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(os, "replace", killing_replace)
    find_duplicates(task, Workers(1))


def test_a_kill_at_the_border_of_each_step(corpus: Corpus, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Each is killed when its last file has its name."""
    borders = ("exact-00003.rows", "exact.bits", "exact.rows", "band-00027.rows", "similar-00008.rows", "near.rows",
               "near.json", "p23.safetensors", "done.json")  # fmt: skip
    task = corpus.task(tmp_path / "borders")
    for border in borders:
        assert in_child(partial(run_until, task, border)) == -signal.SIGKILL, border
    assert content(task.folder) == undisturbed


def test_the_bar_counts_what_an_earlier_start_has_done(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = corpus.task(tmp_path)
    exact.find_exact(task, Workers(1))
    bands = near.join_bands(task, Workers(1))
    for band in bands[: BANDS // 4]:
        band.path.unlink()
    capsys.readouterr()
    near.join_bands(task, Workers(1))
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    shares = [line.split("|")[0].split() for line in lines if line.startswith("joining bands:")]
    assert (shares[0][-1], shares[-1][-1]) == ("75%", "100%")


def test_a_work_folder_of_earlier_code_is_taken_over(
    corpus: Corpus, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """It had exact.rows and near.rows as now, but bands in the order of their hashes, under another name."""
    task = corpus.task(tmp_path / "before")
    finished = ("exact.rows", "exact.bits", "near.rows", "near.json")
    for names in (finished[:2], finished):
        for name in names:
            (task.folder / name).write_bytes(undisturbed[name])
        inodes = [(task.folder / name).stat().st_ino for name in names]
        for remains in ("band-000.pairs", "band-003-00001.run", ".band-001.pairs.host-77-0123abcd.tmp"):
            (task.folder / remains).write_bytes(b"half")
        find_duplicates(task, Workers(1))
        assert content(task.folder) == undisturbed
        assert [(task.folder / name).stat().st_ino for name in names] == inodes
        shutil.rmtree(task.folder)
        task.folder.mkdir()


@pytest.mark.parametrize("total, least, most", [(0, 5, 3), (1, 5, 3), (5, 5, 3), (16, 5, 3), (100, 5, 3), (7, 1, 7)])
def test_pieces_cover_everything_once(corpus: Corpus, tmp_path: Path, total: int, least: int, most: int) -> None:
    pieces = divided(corpus.task(tmp_path), total, least=least, most=most, file="x-{}")
    assert [place for piece in pieces for place in range(piece.start, piece.stop)] == list(range(total))
    assert len(pieces) <= most and all(piece.stop - piece.start >= least for piece in pieces[:-1])
    assert [piece.file for piece in pieces] == [f"x-{number:05d}" for number in range(len(pieces))]


def test_the_names_of_what_is_removed_are_no_results() -> None:
    for pattern in (*dedup.REMAINS, *dedup.INTERMEDIATE):
        for result in ("exact.rows", "exact.bits", "near.rows", "near.json", "done.json", "p0.safetensors"):
            assert not Path(result).match(pattern)


def test_a_worker_is_sent_no_names_of_raw_files(corpus: Corpus, tmp_path: Path) -> None:
    """Each piece carries the task, and there may be 100,000 raw files. Here, where samples are made, they stay."""
    task = corpus.task(tmp_path / "dedup")
    parts = [replace(part, files=((f"a-raw-file-of-{part.name}", part.documents),)) for part in task.parts]
    named = replace(task, parts=tuple(parts))
    sent = pickle.dumps(named)
    assert b"a-raw-file" not in sent and len(sent) == len(pickle.dumps(task))
    assert pickle.loads(sent) == task and named.parts[3].file_of(0) == "a-raw-file-of-p03"
