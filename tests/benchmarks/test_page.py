"""docs/benchmarks.md is that of the records, and a record says on what it was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import families, page, records
from benchmarks.families import ALL_PARTS
from benchmarks.marked import markdown, with_table
from common.errors import DataError
from common.files import write_json
from common.paths import REPOSITORY

PARTS = dict.fromkeys(ALL_PARTS, 0.5)


def test_the_page_has_the_tables_of_the_records() -> None:
    text = page.DOCUMENT.read_text(encoding="utf-8")
    assert page.updated(text) == text, "python -m benchmarks.page"


def test_what_was_never_measured_says_so(tmp_path: Path) -> None:
    text = page.updated(page.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    assert text.count("Not measured yet.") == len(page.MODULES)
    assert page.draw(tmp_path, tmp_path) == []


def test_every_picture_and_record_has_its_module() -> None:
    pictures = {path.stem.removeprefix("benchmark-") for path in page.PICTURES.glob("benchmark-*.png")}
    kept = {path.stem for path in records.RESULTS.glob("*.json")}
    assert pictures <= kept <= set(page.MODULES)


def test_every_mark_has_a_module_and_every_module_a_mark() -> None:
    with pytest.raises(ValueError, match=r"the page has the tables \['nothing'\]"):
        page.updated("<!-- benchmarks.page nothing: begin -->\n<!-- benchmarks.page nothing: end -->")


def test_a_kept_measurement_becomes_table_and_picture(tmp_path: Path) -> None:
    one = families.Measured(100, 10, 50, 1000, [1.0, 2.0, 4.0], PARTS)._asdict()
    other = families.Measured(99, 4, 26, 500, [0.5, 1.0, 1.0], PARTS)._asdict()
    about = records.machine()
    records.keep(tmp_path, "families", about, {"shapes": {"47m": {"dense": one, "SwitchAll": other}}})
    text = page.updated(page.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    assert "| 47m | SwitchAll | 99 | 1.00 | 0.50 |" in text and records.heading(about) in text
    assert page.draw(tmp_path, tmp_path) == [tmp_path / "benchmark-families.png"]
    assert (tmp_path / "benchmark-families.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_names_its_command_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(REPOSITORY / "data" / "a b")])
    monkeypatch.setattr(records, "program", lambda: "benchmarks.loop")
    records.keep(tmp_path / "new", "loop-start", records.machine(), {})
    kept = records.read("loop-start", tmp_path / "new")
    assert kept is not None and kept.command == "python -m benchmarks.loop --data 'data/a b'"


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    assert records.read("families", tmp_path) is None
    write_json(tmp_path / "families.json", {"what": "families"})
    with pytest.raises(DataError, match=r"families\.json is no record"):
        records.read("families", tmp_path)


def test_a_table_replaces_what_stood_between_its_marks() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb"
    assert with_table(text, "x", markdown(["h"], [["1"]])) == (
        "a\n<!-- x: begin -->\n| h |\n| --- |\n| 1 |\n<!-- x: end -->\nb"
    )
    with pytest.raises(ValueError, match="lacks <!-- y: begin -->"):
        with_table(text, "y", "")


def test_a_page_that_was_changed_by_hand_is_found_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, document = page.DOCUMENT.read_text(encoding="utf-8"), tmp_path / "page.md"
    begin = "<!-- benchmarks.page families: begin -->\n"
    document.write_text(right.replace(begin, f"{begin}by hand\n"), encoding="utf-8")
    monkeypatch.setattr(page, "DOCUMENT", document)
    monkeypatch.setattr(page, "draw", list)
    assert page.main(["--check"]) == 1 and "by hand" in document.read_text(encoding="utf-8")
    assert page.main([]) == 0 and document.read_text(encoding="utf-8") == right
    assert page.main(["--check"]) == 0
    document.write_text("no marks", encoding="utf-8")
    capsys.readouterr()
    assert page.main([]) == 2 and document.read_text(encoding="utf-8") == "no marks"
    assert capsys.readouterr().err.startswith("error: the page has the tables []")
