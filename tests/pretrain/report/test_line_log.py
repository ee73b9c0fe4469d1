"""metrics.jsonl and events.jsonl: damaged lines, full disks, and JSON that every reader takes."""

from __future__ import annotations

import errno
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common.line_log
import pretrain.report.board
from common.errors import PassingError, UserError
from common.files import write_json
from common.line_log import LineLog, is_event, is_step
from common.strict_json import dumps
from pretrain.report.board import Board
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_folder import RunFolder, refusal

GARBAGE = [b'{"a": blah\n', b"17\n", b'{"loss": 3.0}\n', b'{"step": true}\n', b"\xff\xfe\0\n", b"[" * 100_000 + b"\n"]
ROWS = [{"step": step, "loss": 0.1 * step} for step in (1, 2, 3)]


def strict(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Files of this process may not grow beyond `num_bytes`: a write is cut there, and the next one refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_a_file_read_from_its_end_has_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(common.line_log, "BLOCK_BYTES", block)
    log = LineLog(tmp_path / "metrics.jsonl", is_step)
    assert not list(log.newest_first())
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    for content in (b"", b"\n", b"".join(lines), lines[0] + b"17\n \n\n" + lines[1] + lines[2] + b'{"step": 4, "lo'):
        log.path.write_bytes(content)
        assert list(log.newest_first()) == list(log.rows())[::-1]


def test_a_start_reads_the_last_steps_of_a_long_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, parsed = RunFolder(tmp_path / "run", writes=True), list[bytes]()
    for step in range(1, 101):
        folder.metrics({"step": step, "loss": None if step == 88 else float(step)})
    original = LineLog._parsed

    def counted(log: LineLog, line: bytes) -> dict[str, Any] | None:
        parsed.append(line)
        return original(log, line)

    monkeypatch.setattr(LineLog, "_parsed", counted)
    assert folder.losses(90, 3) == [87.0, 89.0, 90.0] and len(parsed) < 20
    newest = folder.newest_metrics(90)
    assert newest is not None and newest["step"] == 90 and len(parsed) < 40
    assert folder.newest_metrics(0) is None and folder.losses(2, 10) == [1.0, 2.0]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    value = {"a": [math.nan, 1.5, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": True}}
    expected = {"a": [None, 1.5, [None, "x"]], "b": {"c": None, "d": None, "e": True}}
    assert strict(dumps(value)) == expected
    write_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text()) == expected
    assert dumps(ROWS[0]) == json.dumps(ROWS[0])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_line_is_moved_aside_and_a_torn_end_is_dropped(tmp_path: Path, garbage: bytes) -> None:
    path, rows = tmp_path / "metrics.jsonl", [json.dumps(row).encode() + b"\n" for row in ROWS]
    path.write_bytes(rows[0] + garbage + b"\n" + rows[1] + rows[2] + b'{"step": 4, "lo')
    log = LineLog(path, is_step)
    assert list(log.rows()) == ROWS
    assert log.repair() == 1
    assert path.read_bytes() == b"".join(rows)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == garbage
    assert log.repair() == 0
    log.append({"step": 4})
    assert [row["step"] for row in log.rows()] == [1, 2, 3, 4]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    log = LineLog(path, is_step)
    assert log.repair() == 0
    log.append({"step": 4})
    assert [row["step"] for row in log.rows()] == [1, 2, 3, 4]
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_a_full_disk_costs_no_line_and_leaves_no_torn_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = LineLog(tmp_path / "metrics.jsonl", is_step)
    log.append(ROWS[0])
    before = log.path.read_bytes()
    with disk_of(len(before) + 10):
        log.append(ROWS[1])
        log.append(ROWS[2])
        assert log.path.read_bytes() == before
        with pytest.raises(OSError, match=r"metrics\.jsonl"):  # a failed save names the file
            log.make_durable()
    log.append({"step": 4, "loss": math.nan})
    assert list(log.rows()) == [*ROWS, {"step": 4, "loss": None}]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "cannot be written (File too large)" in said[0] and "no line is missing" in said[1]


def test_a_run_folder_repairs_its_logs_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"metrics.jsonl": ROWS[0], "details.jsonl": ROWS[0], "events.jsonl": {"event": "opened"}}
    for name, row in logs.items():
        (tmp_path / name).write_text(f"nonsense\n{json.dumps(row)}\n17\n")
    folder = RunFolder(tmp_path, writes=True)
    assert folder.losses(5, 10) == [0.1]
    found = [row for row in LineLog(tmp_path / "events.jsonl", is_event).rows() if row["event"] == "damaged_lines"]
    assert [(row["file"], row["lines"]) for row in found] == [(name, 2) for name in logs]
    assert capsys.readouterr().err.count("2 damaged lines were moved to") == 3
    folder.end(ExitCode.FINISHED, "finished")


def test_a_board_hears_of_a_start_that_moves_many_lines_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a newer checkpoint computes 1,500 steps again. They leave metrics.jsonl once events.jsonl has
    them on the disk."""
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps({'step': step})}\n" for step in range(1, 1502)))
    folder, heard = RunFolder(tmp_path, writes=True), list[str]()
    folder.event("checkpoint_passed_over", reason="damaged")
    durable, there, metrics_file = LineLog.make_durable, list[int](), tmp_path / "metrics.jsonl"

    def seen(log: LineLog) -> None:
        there.append(len(metrics_file.read_text().splitlines()))
        durable(log)

    with monkeypatch.context() as patched:
        patched.setattr(LineLog, "make_durable", seen)
        folder.rewind_metrics(1)
    assert there == [1501]
    folder.listen(lambda row: heard.append(row["event"]))
    assert heard == ["opened", "checkpoint_passed_over"]
    moved = [row["metrics"]["step"] for row in LineLog(tmp_path / "events.jsonl", is_event).rows() if "metrics" in row]
    assert moved == [*range(2, 1502)] and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    folder.end(ExitCode.FINISHED, "finished")


def test_lines_that_waited_for_the_disk_are_not_written_behind_those_computed_again(tmp_path: Path) -> None:
    """As of a rollback on a full disk."""
    folder = RunFolder(tmp_path, writes=True)
    for write in (folder.details, folder.metrics):
        write({"step": 1})
        with disk_of(12):
            write({"step": 2})
    folder.rewind_metrics(1)
    for write, name in ((folder.details, "details.jsonl"), (folder.metrics, "metrics.jsonl")):
        write({"step": 2, "again": True})
        assert (tmp_path / name).read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["metrics"] for row in rows if row["event"] == "superseded_metrics"] == [{"step": 2}]
    folder.end(ExitCode.FINISHED, "finished")


def test_a_log_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first rank, which alone reads it, so that the ranks can agree on it."""

    def unanswered(path: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")  # a failed read names no file

    folder = RunFolder(tmp_path, writes=True)
    with monkeypatch.context() as patch:
        patch.setattr(common.line_log, "exists", unanswered)
        for ask, name in (
            (lambda: folder.losses(5, 10), "metrics.jsonl"),
            (lambda: folder.was_validated(5), "events.jsonl"),
            (lambda: folder.has_said_since_start("rollback"), "events.jsonl"),
        ):
            with pytest.raises(PassingError, match=f"^--run-dir: .*{name} cannot be read: Input/output error$"):
                ask()
    full = refusal(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert type(full) is UserError and str(full) == f"--run-dir: {tmp_path} cannot be written: No space left on device"
    folder.end(ExitCode.FINISHED, "finished")


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "checkpoints", "outcome.json"])
def test_what_is_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    if name == "checkpoints":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"--run-dir: .*{name}"):
        RunFolder(tmp_path, writes=True)
    assert not list(tmp_path.glob("lock-*"))


def test_a_file_in_the_place_of_the_boards_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"monitor\.tensorboard: .*tensorboard is to be a folder"):
        Board(tmp_path / "tensorboard", first_step=0)


def test_a_boards_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(folder: Path) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pretrain.report.board, "_next_number", unanswered)
    with pytest.raises(UserError, match=r"^monitor\.tensorboard: .*\(Input/output error\)"):
        Board(tmp_path, first_step=0)


def test_a_start_on_a_full_disk_is_refused_and_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "opened"}\n' * 100)
    with (
        disk_of(1000),
        pytest.raises(UserError, match=r"^--run-dir: .*events\.jsonl cannot be written: File too large$"),
    ):
        RunFolder(tmp_path, writes=True)
    assert not list(tmp_path.glob("lock-*"))


def test_the_end_of_a_run_on_a_full_disk_is_still_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path, writes=True)
    with disk_of(0):
        folder.event("finished", step=3)
        folder.end(ExitCode.DIVERGED, "step 3: loss nan")
    assert not list(tmp_path.glob("lock-*"))
    said = capsys.readouterr().err
    for name in ("events.jsonl", "outcome.json"):
        assert f"warning: {tmp_path / name} cannot be written at the end: File too large\n" in said


@pytest.mark.parametrize("name, other", [("events.jsonl", "outcome.json"), ("outcome.json", "events.jsonl")])
def test_one_file_that_cannot_be_written_at_the_end_keeps_no_other_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, other: str
) -> None:
    folder = RunFolder(tmp_path, writes=True)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    folder.event("finished", step=3)
    folder.end(ExitCode.DIVERGED, "step 3: loss nan", step=3)
    last = json.loads((tmp_path / other).read_text().splitlines()[-1]) if other == "events.jsonl" else None
    assert last is None or (last["event"], last["exit_code"]) == ("failed", ExitCode.DIVERGED)
    assert other == "events.jsonl" or json.loads((tmp_path / other).read_text())["exit_code"] == ExitCode.DIVERGED
    said = [line for line in capsys.readouterr().err.splitlines() if "at the end" in line]
    assert said == [f"warning: {tmp_path / name} cannot be written at the end: Is a directory"]
    assert not list(tmp_path.glob("lock-*"))


def test_a_validation_counts_for_the_course_that_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.event("started", step=0)
    folder.event("validation", step=6, loss=math.nan)
    folder.event("validation", step=9, loss=1.0)
    assert folder.was_validated(6) and not folder.was_validated(5)
    folder.event("rollback", step=9)
    assert folder.has_said_since_start("rollback")
    folder.event("started", step=6)
    assert folder.was_validated(6) and not folder.has_said_since_start("rollback")
    folder.event("started", step=3)  # went back
    assert not folder.was_validated(6)
    folder.event("validation", step=6, loss=1.0)
    folder.event("started", step=6)
    assert folder.was_validated(6)
    folder.event("branch", step=6)  # another course, from the same step
    assert not folder.was_validated(6)
    folder.end(ExitCode.FINISHED, "finished")


def test_the_board_keeps_points_for_a_full_disk_and_hides_superseded_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path, first_step=0)
    board.scalars(1, {"a": 1.0})
    board.flush()
    with disk_of(board.path.stat().st_size + 5):
        board.scalars(2, {"a": 2.0})
        board.flush()
    board.scalars(3, {"a": 3.0})
    board.flush()
    later = Board(tmp_path, first_step=2)
    assert not later.path.exists(), "a start that writes no point leaves no file"
    later.scalars(3, {"a": 30.0})
    later.flush()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in read.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read.Tags()["scalars"] == ["a"]
    assert capsys.readouterr().err.count("cannot be written") == 1
