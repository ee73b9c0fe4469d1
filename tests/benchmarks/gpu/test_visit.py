"""`python -m benchmarks.gpu visit`: its list is the page's, each stop has its own time, and a later call goes on."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import carry, quality_run, record, tables, visit, visit_numbers
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.command import TIME_OVER, Context, Failed, Unavailable
from benchmarks.gpu.processes import captured
from benchmarks.gpu.record import Record, read
from benchmarks.gpu.visit import END_SECONDS, START_SECONDS
from benchmarks.gpu.visit_list import STOPS, Stop
from common.errors import DataError
from tests.benchmarks.gpu import cases
from tests.benchmarks.gpu.cases import ON_CPU, entry
from tests.benchmarks.gpu.test_command import Parts, parts, parts_of  # noqa: F401

ROWS = Stop("speed", ("ceiling",), 60, "first")
TUNE = Stop("tune", ("rope", "route place"), 100, "second")
STEP = Stop("speed", ("micro-step 1b 1",), 50, "third")


def test_the_page_has_the_list() -> None:
    text = tables.NEXT.read_text(encoding="utf-8")
    assert tables.with_list(text) == text, "python -m benchmarks.gpu tables"
    emptied = text[: text.index("| call | s")] + text[text.index("<!-- benchmarks.gpu visit: end") :]
    assert tables.with_list(emptied) == text
    for stop in STOPS:
        assert f"| `{stop.call}` | {stop.seconds} | {stop.why} |" in text


def test_every_stop_names_parts_and_no_part_is_in_two() -> None:
    seen: set[tuple[str, str]] = set()
    names = {command: [part.name for part in parts_of(command)] for command in {stop.command for stop in STOPS}}
    for stop in STOPS:
        for name in stop.only:
            found = {(stop.command, part) for part in names[stop.command] if part.startswith(name)}
            assert found, f"{stop.command} has no part {name}"
            assert not found & seen, f"{name} is in an earlier stop"
            seen |= found
        assert stop.limit > stop.seconds > START_SECONDS


def test_tiles_are_searched_before_they_are_used() -> None:
    """And what decides fits two calls, all but the last stop three, of 540 seconds."""
    order = [stop.call for stop in STOPS]
    tuned = next(i for i, call in enumerate(order) if "micro-step 1b tuned" in call)
    assert all(i < tuned for i, call in enumerate(order) if "sigma_moe forward" in call or "gated_sum" in call)
    assert sum(stop.seconds for stop in STOPS[: tuned + 1]) < 2 * 540
    assert sum(stop.seconds for stop in STOPS[:-1]) < 3 * 540


def test_the_tiny_model_has_a_part_of_nearly_every_stop() -> None:
    plan = visit.planned(STOPS, tiny=True)
    assert {each.stop.command for each in plan} == {"truth", "speed", "tune", "run"}
    assert len(plan) >= len(STOPS) - 4 and all(each.parts for each in plan)
    assert visit.shrunk("equal 262m bf16 route") == "equal tiny bf16 route"
    assert len(visit.planned(STOPS, tiny=False)) == len(STOPS)


# --------------------------------------------------------------------------------------------------------------- calls


class Machine:
    """Runs stops on a clock of its own: each missing part takes `part_seconds` and gets the status that is given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(record, "identity", lambda device: ON_CPU)
        self.folder, self.now, self.part_seconds = folder, 0.0, 20.0
        self.begun: list[tuple[str, float, float]] = []
        self.statuses: dict[str, str] = {}

    def run(self, line: list[str], seconds: float) -> int:
        command, given = line[3], float(line[line.index("--seconds") + 1])
        only = tuple(line[i + 1] for i, word in enumerate(line) if word == "--only")
        assert line[:3] == [sys.executable, "-m", "benchmarks.gpu"] and str(self.folder) in line
        self.begun.append((command, given, seconds))
        self.now += START_SECONDS
        book, end = Record(self.folder, command, ON_CPU), self.now + given
        cut = book.cut()
        for part in sorted(parts_of(command), key=lambda part: part.name in cut):
            if part.name.startswith(only) and part.name not in book.done() and self.now + self.part_seconds <= end:
                status = self.statuses.get(part.name, "passed")
                if status == "hangs":
                    self.now += seconds - START_SECONDS
                    return -9
                if status == "dies":
                    return -11
                self.now += self.part_seconds
                result = {} if status == "passed" else {"reason": "it said so"}
                book.append(part.name, status, self.part_seconds, result)
        return 0

    def visit(self, *stops: Stop, seconds: float = 540.0, **changes: Any) -> int:
        settings = {"seconds": seconds, "list": False, "device": "cpu", "tiny": False, "results": self.folder}
        self.begun = []
        return visit.visit(
            argparse.Namespace(command="visit", **(settings | changes)), stops, run=self.run, clock=lambda: self.now
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_each_stop_has_its_own_time_and_the_next_call_goes_on(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 200 s: two ceilings (55 s with the start), then 95 s of the 200 that the search may take, four of five parts,
    and nothing more. Then the fifth."""
    found = visit.planned([ROWS, TUNE, STEP], tiny=False)
    assert [len(each.parts) for each in found] == [2, 5, 1]
    margin = START_SECONDS + END_SECONDS
    assert machine.visit(ROWS, TUNE, STEP, seconds=200.0) == TIME_OVER
    assert machine.begun == [("speed", 120.0, 120.0 + margin), ("tune", 200.0 - 55.0 - margin, 200.0 - 55.0)]
    output = capsys.readouterr().out
    assert '=== stop 2 of 3, 95 s left: tune --only "rope" --only "route place"' in output
    assert "| tune rope, route place | 5 | 4 | 0 | 1 | 80 | 100 |" in output
    assert "2 parts are left: the same command goes on with them" in output
    assert machine.now <= 200.0
    machine.now = 0.0
    assert machine.visit(ROWS, TUNE, STEP, seconds=200.0) == 0
    assert [command for command, *_ in machine.begun] == ["tune", "speed"]
    assert machine.visit(ROWS, TUNE, STEP, seconds=200.0) == 0 and machine.begun == []


def test_a_stop_that_hangs_or_fails_does_not_keep_the_others(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.statuses = {"ceiling copy": "hangs", "micro-step 1b 1": "failed"}
    assert machine.visit(ROWS, TUNE, STEP, seconds=2000.0) == 1
    assert [command for command, *_ in machine.begun] == ["speed", "tune", "speed"]
    output = capsys.readouterr().out
    assert "=== stop 1 of 3 ended with -9" in output and "cut: ceiling copy: its process ended with -9" in output
    assert "failed: micro-step 1b 1: it said so" in output
    assert "| speed ceiling | 2 | 0 | 0 | 2 | 170 | 60 |" in output
    machine.statuses = {}
    assert machine.visit(ROWS, TUNE, STEP, seconds=2000.0) == 1  # a recorded failure stays one
    assert len(machine.begun) == 1


def test_a_part_that_kills_its_process_keeps_nothing_of_its_stop(machine: Machine) -> None:
    """What follows it is computed in the same call. It is tried again behind the others, in a later call too."""
    machine.statuses = {"ceiling copy": "dies"}
    assert machine.visit(ROWS, STEP, seconds=2000.0) == TIME_OVER
    assert [command for command, *_ in machine.begun] == ["speed", "speed", "speed"]
    given = [seconds for _, seconds, _ in machine.begun]
    assert given[:2] == [ROWS.limit, ROWS.limit - START_SECONDS]  # no more than the rest of the stop's time
    entries = {one.part: one for one in read(machine.folder / "cpu" / "speed.jsonl")}
    assert {name: one.status for name, one in entries.items()} == {
        "ceiling copy": "cut",
        "ceiling product": "passed",
        "micro-step 1b 1": "passed",
    }
    assert entries["ceiling copy"].result == {"reason": "its process ended with -11"}
    assert machine.visit(ROWS, TUNE, seconds=2000.0) == TIME_OVER
    assert [command for command, *_ in machine.begun] == ["tune", "speed"]
    machine.statuses = {}
    assert machine.visit(ROWS, TUNE, STEP, seconds=2000.0) == 0 and len(machine.begun) == 1


def test_a_command_that_dies_whenever_it_starts_is_left(machine: Machine) -> None:
    machine.statuses = {part.name: "dies" for part in parts_of("tune")}
    assert machine.visit(TUNE, seconds=2000.0) == TIME_OVER
    assert len(machine.begun) == visit.MOST_DEATHS < len(visit.planned([TUNE], tiny=False)[0].parts)


def test_records_are_where_the_call_names_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands start in the project's folder, wherever the call was made."""
    monkeypatch.chdir(machine.folder)
    assert machine.visit(ROWS, results=Path(".")) == 0


def test_nothing_is_begun_where_nothing_could_be_recorded(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    (machine.folder / "file").write_text("")
    assert machine.visit(ROWS, results=machine.folder / "file" / "folder") == 2 and machine.begun == []
    assert "visit: nothing can be written to" in capsys.readouterr().err


def test_what_needs_more_time_than_is_left_is_not_begun(machine: Machine) -> None:
    """A shorter stop behind it is."""
    (longest,) = (part for part in parts_of("run") if part.name == "cuda graphs 1b")
    graphs = Stop("run", ("cuda graphs 1b",), 140, "long")
    left = START_SECONDS + END_SECONDS + longest.least_seconds
    assert machine.visit(graphs, STEP, seconds=left - 1.0) == TIME_OVER
    assert [command for command, *_ in machine.begun] == ["speed"]
    assert machine.visit(graphs, STEP, seconds=machine.now + left) == 0


def test_the_list_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["visit", "--list"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == len(STOPS) + 2
    assert main(["visit"]) == 3
    assert "there is no GPU here" in capsys.readouterr().err


def test_the_list_says_what_is_recorded(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.visit(ROWS)
    capsys.readouterr()
    assert machine.visit(ROWS, STEP, list=True) == 0
    assert "| speed ceiling | 2 | 2 | 0 | 0 | 40 | 60 |" in capsys.readouterr().out and machine.begun == []


TIMES = (0.5, 4.0, 32.0)
"""Seconds after which a command is ended: the next where a busy machine has not begun it."""
PATH = {"PATH": os.environ["PATH"]}


def wait_for_end(pid: int) -> None:
    """What is killed ends when it is its turn, and is gone as soon as its new parent has waited for it."""
    for _ in range(6000):
        try:
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} goes on")


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """It and its child, which would keep the GPU."""
    told = tmp_path / "pid"
    child = "import os, subprocess, sys, time; p = subprocess.Popen(['/bin/sleep', '600'])"
    code = f"{child}; open('w', 'w').write(str(p.pid)); os.rename('w', {str(told)!r}); time.sleep(600)"
    line = [sys.executable, "-S", "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"]
    for seconds in TIMES:
        assert visit.run(line, seconds) == -9
        if told.exists():
            break
    wait_for_end(int(told.read_text()))
    assert visit.run([sys.executable, "-S", "-c", "raise SystemExit(5)"], 60.0) == 5


def test_what_is_captured_does_not_outlive_its_time(tmp_path: Path) -> None:
    """Nor is it waited for: a child holds the pipes that its parent, killed alone, would leave open."""
    told = tmp_path / "pid"
    begin = time.monotonic()
    for seconds in TIMES:
        assert captured(["/bin/sh", "-c", "sleep 600 & echo $! > w; mv w pid; wait"], seconds, tmp_path, PATH) is None
        if told.exists():
            break
    assert time.monotonic() - begin < 300.0
    wait_for_end(int(told.read_text()))
    done = captured(["/bin/sh", "-c", "echo $word; echo no >&2; exit 3"], 60.0, tmp_path, {"word": "yes"})
    assert done is not None and (done.returncode, done.stdout, done.stderr) == (3, "yes\n", "no\n")


def test_a_part_that_was_cut_comes_behind_the_others(parts: Parts) -> None:  # noqa: F811
    Record(parts.folder, "truth", ON_CPU).append("a", "cut", 1.0, {})
    listed = [parts.part(name) for name in "abc"]
    assert parts.run(listed, seconds=22.0) == TIME_OVER and parts.ran == ["b", "c"]
    assert parts.run(listed) == 0 and parts.ran == ["a"]


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_numbers_that_matter() -> None:
    backends = [
        {"backend": "triton", "forward": {"ms": 0.5}, "backward": {"ms": 1.0}},
        {"backend": "F.grouped_mm, sorted rows", "forward": {"ms": 0.4}, "backward": {"ms": 0.8}},
        {"backend": "cuda", "skipped": "no"},
    ]
    speed = [
        entry("micro-step 1b graphs 16", mfu=0.391),
        entry("micro-step 1b graphs 8", "failed", mfu=0.9),
        entry("micro-step 1b tuned 32", mfu=0.412, today={"mfu": 0.395}),
        entry("block 1b", time_over_macs=1.57),
        entry("kernel 1b sigma_moe N=1", backends=backends),
    ]
    records = {"speed": {one.part: one for one in speed}}
    shares, ratio, kernels, tiles = visit_numbers.lines(records)
    assert shares.endswith("(40% are wanted): graphs 16 39.1%, tuned 32 41.2% (today's 39.5%)")
    assert ratio.endswith("(at most 1.3 is wanted): block 1b 1.57")
    assert kernels.endswith("ms: triton 0.5 + 1, F.grouped_mm, sorted rows 0.4 + 0.8")
    assert tiles == "kernels with faster tiles: 0 of 0 that were searched: not measured"
    assert all(line.endswith("not measured") for line in visit_numbers.lines({}))


# ------------------------------------------------------------------------------------------------------------- quality


def context(folder: Path, remaining: float = 1000.0) -> Context:
    return cases.context(folder, tiny=False, remaining=remaining)


def test_quality_needs_its_text_and_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quality_run, "ROOT", tmp_path)
    monkeypatch.setattr(carry, "FOLDER", tmp_path / ".carry")
    with pytest.raises(Unavailable, match="carry a prepared text"):
        quality_run.quality(context(tmp_path))
    source = tmp_path / "own"
    with pytest.raises(DataError, match=r"--text: .*own has no manifest\.json"):
        carry.copy_text(source, carry.FOLDER / "data" / carry.TEXT)
    source.mkdir()
    (source / "manifest.json").write_text("{}")
    carry.copy_text(source, carry.FOLDER / "data" / carry.TEXT)
    former = tmp_path / "runs" / "quality-gpu" / "other sources" / "records"
    kept = tmp_path / "runs" / "quality-gpu" / ON_CPU.sources / "records"
    monkeypatch.setattr(record, "identity", lambda device: ON_CPU)
    for folder in (former, kept):
        folder.mkdir(parents=True)
        (folder / "dense-250-0.001-0.json").write_text(json.dumps({"name": "dense"}))
    lines: list[list[str]] = []

    def ended(code: int | None) -> Any:
        def within(line: list[str], seconds: float, cwd: Path) -> int | None:
            assert seconds == 1000.0 and cwd == tmp_path
            lines.append(line)
            return code

        return within

    monkeypatch.setattr(quality_run, "within", ended(None))
    with pytest.raises(
        Unavailable, match="the time was over after 1 runs; they are kept in runs/quality-gpu/0/records"
    ):
        quality_run.quality(context(tmp_path))
    monkeypatch.setattr(quality_run, "within", ended(2))
    with pytest.raises(Failed, match="ended with 2 after 1 runs") as failure:
        quality_run.quality(context(tmp_path))
    assert failure.value.result == {"records": [{"name": "dense"}]}
    assert "--jobs 10 --set batch.micro_sequences=32" in " ".join(lines[0])


@pytest.mark.slow
def test_a_whole_visit_on_the_cpu(tmp_path: Path) -> None:
    """Two calls; every part of the tiny model is recorded once, but for what needs a GPU, or tiles that are faster."""
    words = ["visit", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--seconds"]
    main([*words, "120"])
    main([*words, "3000"])
    plan = visit.planned(STOPS, tiny=True)
    for command in {each.stop.command for each in plan}:
        entries = read(tmp_path / "cpu" / f"{command}.jsonl")
        passed = [one.part for one in entries if one.status == "passed"]
        assert len(passed) == len(set(passed))
        wanted = {part.name for each in plan if each.stop.command == command for part in each.parts}
        others = {one.part: one.status for one in entries if one.part in wanted - set(passed)}
        for part, status in others.items():
            assert part.startswith(("counters", "sparse", "racecheck")) or "tuned" in part or status == "failed", part
        assert set(passed) | others.keys() == wanted
