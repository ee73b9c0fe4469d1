"""The table of several runs that launch/status.py shows."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.status import main
from pretrain.views.reading import RunView
from pretrain.views.status import runs_table
from tests.pretrain.views.status_case import write


def test_runs_of_one_name_are_told_apart_in_a_narrow_table(tmp_path: Path) -> None:
    views = [RunView.open(write(tmp_path / f"sweep of rate {n}" / "run")) for n in (1, 2)]
    title, *rows = runs_table(views, time.time(), width=60).splitlines()
    assert title.startswith("run ") and max(map(len, rows)) <= 60
    names = [row.split("  ")[0] for row in rows if "sweep" in row or "run" in row]
    assert len(names) == 2 == len(set(names)), names


def test_a_table_of_runs_has_the_width_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names stand for paths, then columns are left out, the least important first; never the loss or a run."""
    runs = [str(write(tmp_path / f"tiny,learning_rate={n}e-3,weight_decay=0.1", n)) for n in range(1, 4)]

    def table(columns: str | None) -> list[str]:
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        assert main(runs) == 0
        return capsys.readouterr().out.splitlines()

    whole = table(None)  # stdout is no terminal here
    assert [line.split()[0] for line in whole[1:]] == runs and "newest line" in whole[0]
    for columns, titles in [
        ("40", ["run", "state", "step", "loss"]),
        ("60", ["run", "state", "step", "of", "loss", "time", "left"]),
        ("80", ["run", "state", "step", "of", "loss", "validation", "s/step", "time", "left"]),
        ("110", whole[0].split()),
    ]:
        lines = table(columns)
        assert lines[0].split() == titles and len(lines) == 4 and max(map(len, lines)) <= int(columns), lines
        assert [line.split()[2] for line in lines[1:]] == ["1", "2", "3"]
        # What the names differ in stays, whatever else is cut.
        assert all(f"rate={n}" in line.split()[0] or columns == "40" for n, line in enumerate(lines[1:], 1)), lines
        assert len({line.split()[0] for line in lines[1:]}) == 3, lines
        assert [f"{5 - n / 10:.4f}" in line for n, line in enumerate(lines[1:], 1)] == [True] * 3


def test_a_folder_that_may_not_be_read_keeps_nobody_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of another user, or of a file system that does not answer."""
    good, locked = write(tmp_path / "good"), write(tmp_path / "locked")
    stat = os.stat

    def refusing(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(f"{locked}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", refusing)
    assert main([str(locked), str(good)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"passed over: {locked} cannot be read: Permission denied\n"
    assert "it continues from step-00000008" in printed.out  # a long name is cut
