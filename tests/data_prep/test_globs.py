"""Globs below folders whose own names hold glob characters: `a dir [work]`."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data_prep.config import resolved
from data_prep.config.resolved import _find
from data_prep.raw.locations import expand, match

NAMES = ["part0.gz", "part1.gz", "part2.gz"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder raw/ with NAMES and another file, below names that are globs of nothing that exists, or of another."""
    folder = tmp_path / "a dir [work]" / "*x" / "raw"
    for parent in (folder, tmp_path / "a dir w" / "*x" / "raw"):
        parent.mkdir(parents=True)
        for name in (*NAMES, "other.txt"):
            (parent / name).write_text(str(parent))
    return folder


def test_folders_that_exist_are_meant_literally(raw: Path) -> None:
    root, expected = raw.parents[2], [raw / name for name in NAMES]
    below = str(raw.relative_to(root))
    assert match(raw.parent, "raw/*.gz") == expected
    assert match(raw.parent, "**/part*") == expected
    assert match(raw.parent, "./raw/part[!9].gz") == expected
    assert match(root, f"{below}/*.gz") == match(Path("/nowhere"), f"{raw}/*.gz") == expected
    assert match(raw, "part[12].gz") == match(Path("/nowhere"), f"{raw}/part[12].gz") == expected[1:]
    assert match(root, "a dir [a-z]/*/raw/part0.gz") == [root / "a dir w" / "*x" / "raw" / "part0.gz"]
    assert match(raw, "[ab]*.gz") == []


def test_so_they_are_in_urls(raw: Path) -> None:
    assert [str(file) for file in match(Path(), f"file://{raw}/part*")] == [f"file://{raw}/{name}" for name in NAMES]
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/dir [work]/raw/{name}": b"x" for name in NAMES})
    try:
        found = [str(file) for file in match(Path(), "memory://dir [work]/raw/part[01].gz")]
    finally:
        for name in NAMES:
            memory.rm_file(f"/dir [work]/raw/{name}")
    assert found == [f"memory:///dir [work]/raw/{name}" for name in NAMES[:2]]


def test_inputs_of_shipped_configurations_are_found(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are relative: below the current folder, or below the repository."""
    monkeypatch.chdir(raw.parent)
    assert [Path(str(file)).name for file in _find("input", ("raw/*.gz",), origin=None)] == NAMES
    monkeypatch.chdir("/")
    monkeypatch.setattr(resolved, "REPOSITORY", raw.parent)
    assert _find("input", ("raw/*.gz",), origin=None) == [raw / name for name in NAMES]


def test_braces_may_be_longer_than_the_name_of_a_file(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.parent)
    names = [f"crawl-{number:03d}" for number in range(40)]
    assert expand(f"raw/{{{','.join(names)}}}.gz") == [f"raw/{name}.gz" for name in names]
    command = f"pipe:jq -c '{{text: .body}}' {'a' * 300}"
    assert expand(command) == [command]
