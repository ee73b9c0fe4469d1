"""benchmarks/gpu/command.py: order, time, record, resumption and exit status, by a clock that only the parts move."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import command, record
from benchmarks.gpu.__main__ import COMMANDS, main
from benchmarks.gpu.command import TIME_OVER, Context, Failed, Late, Part, Unavailable
from benchmarks.gpu.record import read
from tests.benchmarks.gpu.cases import ON_CPU


class Parts:
    """Parts that take ten seconds of a clock of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command.record, "identity", lambda device: ON_CPU)
        self.folder, self.now, self.ran = folder, 0.0, [""]

    def part(self, name: str, outcome: Exception | dict[str, Any] | None = None) -> Part:
        def compute(context: Context) -> dict[str, Any]:
            self.ran.append(name)
            self.now += 10.0
            if isinstance(outcome, Exception):
                raise outcome
            return outcome or {}

        return Part(name, compute)

    def run(self, parts: list[Part], **changes: Any) -> int:
        settings = {"seconds": 100.0, "only": None, "list": False, "again": False, "device": "cpu", "tiny": True}
        settings["shared"] = False
        options = argparse.Namespace(command="truth", results=self.folder, **(settings | changes))
        self.ran = []
        return command.run_parts(options, parts, clock=lambda: self.now)

    @property
    def statuses(self) -> dict[str, str]:
        return {entry.part: entry.status for entry in read(self.folder / "cpu" / "truth.jsonl")}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(tmp_path, monkeypatch)


def test_every_part_is_recorded_with_what_became_of_it(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {"a": None, "b": Failed("no", {"error": 1.0}), "c": Unavailable("no tool"), "d": KeyError("x")}
    assert parts.run([parts.part(name, outcome) for name, outcome in outcomes.items()]) == 1
    assert parts.ran == ["a", "b", "c", "d"]
    assert parts.statuses == {"a": "passed", "b": "failed", "c": "skipped", "d": "failed"}
    b, d = (e for e in read(parts.folder / "cpu" / "truth.jsonl") if e.part in "bd")
    assert b.result == {"error": 1.0, "reason": "no"} and b.seconds == 10.0
    assert d.result == {"reason": "KeyError: 'x'"}
    output = capsys.readouterr().out
    assert "[3/4, 80 s left] c" in output and "skipped in 10.0 s: no tool" in output
    assert "| d | failed | 10.0 | KeyError: 'x' |" in output and "4 parts, 2 failed, 0 cut, 0 not begun" in output


def test_it_stops_when_the_time_is_over_and_goes_on_later(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    listed = [parts.part(name) for name in "abcd"]
    assert parts.run(listed, seconds=22.0) == TIME_OVER
    assert parts.ran == ["a", "b"]
    assert "not begun, the time was over: c, d" in capsys.readouterr().out
    assert parts.run(listed, seconds=22.0) == 0
    assert parts.ran == ["c", "d"]
    assert parts.run(listed) == 0 and parts.ran == []
    assert parts.run(listed, again=True) == 0 and parts.ran == ["a", "b", "c", "d"]


def test_a_recorded_failure_stays_one(parts: Parts) -> None:
    listed = [parts.part("a", Failed("no"))]
    assert [parts.run(listed), parts.run(listed)] == [1, 1]
    assert parts.ran == []
    assert parts.run([*listed, parts.part("b"), parts.part("c")], seconds=12.0) == 1, "also where parts are left"


def test_what_came_too_late_is_no_failure(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is it done: it is tried again, behind the others."""
    assert parts.run([parts.part("a", Late("it did not end in 9 s")), parts.part("b")], only=["a"]) == TIME_OVER
    assert "\n1 parts, 0 failed, 1 cut, 0 not begun\n  cut, they did not end in time: a;" in capsys.readouterr().out
    assert parts.statuses == {"a": "cut"}
    assert parts.run([parts.part("a"), parts.part("b")]) == 0 and parts.ran == ["b", "a"]
    assert parts.statuses == {"a": "passed", "b": "passed"}


def test_a_part_knows_what_is_asked_for(parts: Parts) -> None:
    """Not what is recorded, unless it is repeated."""
    told: list[frozenset[str]] = []
    listed = [parts.part(name) for name in ("a", "b", "c")]
    asking = Part("ask", lambda context: told.append(context.asked) or {})  # type: ignore[func-returns-value]
    shared: list[bool] = []
    sharing = Part("ask sharing", lambda context: shared.append(context.shared) or {})  # type: ignore[func-returns-value]
    parts.run(listed, only=["a"])
    for again in (False, True):
        parts.run([*listed, asking, sharing], only=["a", "b", "ask"], again=again, shared=again)
    assert told == [{"b", "ask", "ask sharing"}, {"a", "b", "ask", "ask sharing"}] and shared == [False, True]


def test_some_parts_alone(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    listed = [parts.part(name) for name in ("equal a", "equal b", "repeat a", "not equal a")]
    assert parts.run(listed, only=["equal"]) == 0
    assert parts.ran == ["equal a", "equal b"]
    assert parts.run(listed, list=True) == 0 and parts.ran == []
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[-1] for line in lines] == ["passed", "-", "-"]
    assert parts.run(listed, only=["repeat", "equal a"], again=True) == 0 and parts.ran == ["equal a", "repeat a"]
    capsys.readouterr()
    parts.ran = []
    for only in (["spede"], ["equal", "spede"]):
        assert parts.run(listed, only=only) == 2 and parts.ran == []
        assert capsys.readouterr().out == "benchmarks.gpu truth: no part is called spede: see --list\n"


@pytest.mark.parametrize("page", ["gpu.md", "untested-on-gpu.md"])
def test_the_parts_that_a_page_names_are_there(page: str) -> None:
    """Every `--only NAME`, of the command that stands before it in its line."""
    known = {name: [part.name for part in parts_of(name)] for name in COMMANDS}
    asked: list[tuple[str, str]] = []
    for line in (record.ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        for match in re.finditer(r'--only (?:"([^"]+)"|([a-z]+))', line):
            before = [word for word in re.findall(r"[a-z]+", line[: match.start()]) if word in COMMANDS]
            asked.append((before[-1] if before else "tune", match[1] or match[2]))
    assert len(asked) >= 2
    for name, only in asked:
        assert any(part.startswith(only) for part in known[name]), f"{page}: no part of {name} is called {only}"


def parts_of(name: str) -> list[Part]:
    found: list[Part] = list(importlib.import_module(f"benchmarks.gpu.{name}").parts(tiny=False))
    return found


def test_a_part_knows_what_earlier_ones_measured(parts: Parts) -> None:
    seen: list[dict[str, Any]] = []

    def compute(context: Context) -> dict[str, Any]:
        seen.append(dict(context.measured))
        return {}

    first = parts.part("first", {"ms": 3.0})
    parts.run([first, Part("second", compute)])
    parts.run([first, Part("third", compute)])
    assert seen[0] == {"first": {"ms": 3.0}} and seen[1]["first"] == {"ms": 3.0}


def test_what_a_failed_part_measured_is_not_known_to_later_ones(parts: Parts) -> None:
    """Neither in this call nor in the next: a ceiling that failed would be one all the same."""
    seen: list[set[str]] = []

    def compute(context: Context) -> dict[str, Any]:
        seen.append(set(context.measured))
        return {}

    failed = parts.part("failed", Failed("no", {"ms": 3.0}))
    for name in ("second", "third"):
        parts.run([failed, parts.part("passed"), Part(name, compute)])
    assert seen == [{"passed"}, {"passed", "second"}]


@pytest.mark.parametrize("shared", [False, True])
def test_a_fresh_process_goes_on_where_cuda_is_unusable(
    shared: bool, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is left of the time, and all that was asked for; not after a part that failed by a check alone."""
    begun: list[list[str]] = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: begun.append(words))
    listed = [parts.part("a", Failed("no")), parts.part("b")]
    for usable in (True, False):
        monkeypatch.setattr(command, "_usable", lambda usable=usable: usable)
        parts.run(listed, device="cuda", only=["a", "b"], shared=shared, again=True, seconds=60.0)
        assert bool(begun) is not usable
    options = command.argparse.ArgumentParser()
    command.add_options(options)
    (words,) = begun
    assert words[1:4] == ["-m", "benchmarks.gpu", "truth"]
    found = options.parse_args(words[4:])
    assert (found.seconds, found.only, found.shared, found.results) == (50.0, ["a", "b"], shared, parts.folder)


def test_a_part_that_hangs_is_recorded_as_cut(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's own function, without the timer and without ending this process."""
    ended: list[int] = []
    monkeypatch.setattr(command.os, "_exit", ended.append)
    monkeypatch.setattr(command, "end_all_below", lambda pid: ended.append(pid - os.getpid()))

    class AtOnce:
        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            assert seconds == 100.0 + command.GRACE_SECONDS
            self.start = function

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(command.threading, "Timer", AtOnce)
    listed = [parts.part("hangs")]
    parts.run(listed)
    assert ended == [0, TIME_OVER]  # first what it started, then itself
    first = read(parts.folder / "cpu" / "truth.jsonl")[0]
    assert (first.part, first.status) == ("hangs", "cut")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["truth"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no GPU here: nothing was checked and nothing was timed" in captured.err
    assert main(["truth", "--list"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) > 100 and all(line.endswith(" -") for line in captured.out.splitlines())
    assert captured.err == ""


def test_what_a_cpu_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["truth", "--device", "cpu"]) == 2
    assert "--device cpu needs --tiny" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["truth", "--device", "cpu", "--tiny"]) == 2
    assert "needs TRITON_INTERPRET=1" in capsys.readouterr().err
