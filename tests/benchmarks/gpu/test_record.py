"""benchmarks/gpu/record.py and tables.py: what a line says, which parts count as done, the tables of docs/gpu.md."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import record, tables
from benchmarks.gpu.record import CUT, FAILED, PASSED, SKIPPED, Entry, Identity, Record

H100 = Identity(
    card="NVIDIA H100 80GB HBM3", driver="580.1", python="3.12.3", torch="2.11.0+cu130", cuda="13.0", triton="3.6.0",
    sources="0123456789abcdef",
)  # fmt: skip


def test_a_line_says_what_where_and_when(tmp_path: Path) -> None:
    book = Record(tmp_path, "truth", H100)
    written = book.append("copy", PASSED, 1.25, {"bytes_per_second": 3e12})
    assert book.path == tmp_path / "nvidia-h100-80gb-hbm3" / "truth.jsonl"
    assert record.read(book.path) == [written]
    assert written.identity == dataclasses.asdict(H100) and written.date.endswith("+00:00")
    assert written.command.startswith("python -m benchmarks.gpu") and written.seconds == 1.2
    here = record.identity("cpu")
    assert (here.card, here.torch, here.driver) == ("CPU", torch.__version__, record.NO_DRIVER)
    assert len(book.path.read_text().splitlines()) == 1


def test_a_line_names_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/7")
    monkeypatch.setenv("HOME", "/home/ada")
    said = f"{record.ROOT}/configs/a.json in '/scratch/7/x/runs' and /home/ada/.triton failed"
    book = Record(tmp_path, "run", H100)
    written = book.append("tiny", FAILED, 1.0, {"reason": said, "rows": [{"said": said}], "losses": [1.5, None]})
    plain = "configs/a.json in 'TMP/x/runs' and HOME/.triton failed"
    assert written.result == {"reason": plain, "rows": [{"said": plain}], "losses": [1.5, None]}
    assert record.read(book.path) == [written]


def test_no_record_names_a_folder_of_a_machine() -> None:
    for path in (record.ROOT / "benchmarks").glob("**/results/**/*.json*"):
        found = re.findall(r"(?<![\w.<>*])/(?:work|tmp|root|home|opt|mnt)/[^\s'\"]*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(record.ROOT)}: {found[:3]}"


def test_what_counts_as_done(tmp_path: Path) -> None:
    book = Record(tmp_path, "truth", H100)
    ends = {"a": (FAILED, PASSED), "b": (CUT,), "c": (SKIPPED,), "d": (FAILED,), "e": (CUT, PASSED)}
    for part, status in ((part, status) for part, found in ends.items() for status in found):
        book.append(part, status, 0.0, {})
    with book.path.open("a") as file:
        file.write('{"part": "f", "sta')  # a process that was ended while it wrote
    assert {name: entry.status for name, entry in book.done().items()} == {"a": PASSED, "d": FAILED, "e": PASSED}
    assert book.cut() == {"b"} and book.last()["c"].status == SKIPPED
    for change in ({"driver": "581"}, {"torch": "2.13.0"}, {"triton": "3.7.1"}, {"sources": "f" * 16}):
        other = Record(tmp_path, "truth", dataclasses.replace(H100, **change))
        assert other.path == book.path and other.done() == {}


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    book = Record(tmp_path, "truth", H100)
    for name in "ab":
        book.append(name, "passed", 1.0, {})
    book.path.write_bytes(book.path.read_bytes()[:-20])
    assert list(book.done()) == ["a"]
    for name in "cd":
        book.append(name, "passed", 1.0, {})
    assert list(book.done()) == ["a", "c", "d"] and book.path.read_text().count("\n") == 4


def test_the_revision_with_and_without_git(tmp_path: Path) -> None:
    file = tmp_path / ".carry" / "REVISION"
    tree = tmp_path / "tree"
    (tree / "model").mkdir(parents=True)
    (tree / "model" / "a.py").write_text("a = 1\n")
    (tree / "notes.md").write_text("no source")
    assert record.revision.__wrapped__(tree, file) == "unknown"
    file.parent.mkdir()
    file.write_text("fedcba987654\n")
    assert record.revision.__wrapped__(tree, file) == "fedcba987654"
    as_somebody = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["git", "init", "-q"], ["git", "add", "."], [*as_somebody, "commit", "-qm", "a"]):
        subprocess.run(words, cwd=tree, check=True)
    revision = record.revision.__wrapped__(tree, file)
    assert len(revision) == 12 and revision != "fedcba987654"
    assert record.revision.__wrapped__(tree / "model", file) == "fedcba987654", "a tree inside another's repository"
    (tree / "notes.md").write_text("still no source")
    (tree / "model" / "untracked.log").write_text("")
    assert record.revision.__wrapped__(tree, file) == revision
    (tree / "model" / "a.py").write_text("a = 2\n")
    assert record.revision.__wrapped__(tree, file) == revision + "+changes"


def test_the_hash_of_the_sources_sees_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    path = tmp_path / "model" / "a.py"
    path.write_text("a = 1\n")
    first = record.sources(tmp_path)
    (tmp_path / "model" / "notes.md").write_text("no source")
    (tmp_path / "benchmarks" / "results" / "losses.json").write_text("{}")
    assert record.sources(tmp_path) == first
    path.write_text("a = 2\n")
    second = record.sources(tmp_path)
    path.rename(path.with_name("b.py"))
    assert len({first, second, record.sources(tmp_path)}) == 3
    own = ("benchmarks", "common", "pretrain", "launch", "data_prep", "configs")
    for name in ("model/tiles.json", "model/route.cu", *(f"{folder}/a.json" for folder in own)):  # they decide, too
        before = record.sources(tmp_path)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
        assert record.sources(tmp_path) != before


def test_the_page_has_the_tables_of_the_records() -> None:
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert tables.updated(text, record.RESULTS) == text


def test_a_table_comes_from_the_last_identity_and_the_last_entry(tmp_path: Path) -> None:
    text = "".join(
        f"{name}:\n<!-- benchmarks.gpu {name}: begin -->\nold\n<!-- benchmarks.gpu {name}: end -->\n"
        for name in tables.TABLES
    )
    empty = tables.updated(text, tmp_path)
    assert "old" not in empty and empty.count(tables.EMPTY) == len(tables.TABLES)
    times = {"ms": 1.0, "low": 0.9, "high": 1.1}
    old = Record(tmp_path, "truth", dataclasses.replace(H100, driver="570"))
    old.append("ceiling copy", PASSED, 1.0, times | {"bytes_per_second": 1e12})
    book = Record(tmp_path, "truth", H100)
    for speed in (2e12, 3e12):
        book.append("ceiling copy", PASSED, 1.0, times | {"bytes_per_second": speed})
    rows = [{"backend": name, "error": error} for name, error in (("a", 0.1), ("b", float("nan")), ("c", 0.2))]
    book.append("equal 262m fp32 route", FAILED, 1.0, {"backends": rows})
    for backend, error in (("triton", 0.002), ("cpu", 0.003)):
        rows = [{"backend": backend, "error": error}]
        book.append(f"equal 1b bf16 route {backend}", PASSED, 1.0, {"backends": rows})
    for number, status in enumerate((FAILED, SKIPPED, SKIPPED, PASSED)):
        book.append(f"equal 262m bf16 route {number}", status, 1.0, {})
    full = tables.updated(text, tmp_path)
    assert "| copy | 3 TB/s | 0.9, 1.1 |" in full and "1 TB/s" not in full and "2 TB/s" not in full
    assert "NVIDIA H100 80GB HBM3, driver 580.1, Python 3.12.3, torch 2.11.0+cu130, triton 3.6.0" in full
    assert "| equal 1b bf16 | 2 | 2 | 0 | 0 | 3.0e-03 |" in full
    assert "| equal 262m bf16 | 4 | 1 | 1 | 2 | - |" in full and "| equal 262m fp32 | 1 | 0 | 1 | 0 | nan |" in full
    assert tables.updated(full, tmp_path) == full
    with pytest.raises(ValueError, match="has the tables"):
        tables.updated(text.replace("benchmarks.gpu truth", "benchmarks.gpu lies"), tmp_path)


def test_what_was_not_measured_again_stays_below(tmp_path: Path) -> None:
    times = {"ms": 1.0, "low": 0.9, "high": 1.1}

    def measure(sources: str, part: str, speed: float, status: str = PASSED) -> None:
        book = Record(tmp_path, "truth", dataclasses.replace(H100, sources=sources))
        book.append(part, status, 1.0, times | {"bytes_per_second": speed})

    for speed in (1e12, 2e12):
        measure("first", "ceiling copy", speed)
    measure("first", "ceiling other", 3e12)
    measure("second", "ceiling other", 4e12, FAILED)
    measure("third", "ceiling copy", 5e12, CUT)

    def rows(entries: list[Entry]) -> tables.Rows:
        return [("copy", ""), *((entry.part, tables.headline(entry)) for entry in entries)]

    table = tables.document_table(tmp_path, "truth", rows)
    newest, *before = table.split("NVIDIA H100")[1:]
    assert "5 TB/s" in newest and "not since" not in newest
    assert len(before) == 1, "a part that failed later has no number of before, and one that was cut has"
    assert "not since" in before[0] and "2 TB/s" in before[0] and before[0].count("TB/s") == 1
