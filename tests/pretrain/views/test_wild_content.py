"""A run folder may hold anything: torn files, values of another version, what a bad disk gives. None is a traceback."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain.cli.compare
import pretrain.cli.status
from common.errors import UserError
from common.run_lock import SignOfLife
from pretrain.views.comparison import open_runs
from pretrain.views.comparison_text import text
from pretrain.views.reading import RunView
from pretrain.views.status import runs_table, screen, summary

WILD = (None, True, 0, -1, 10**400, 1e300, float("nan"), float("-inf"), "", "x\x1b[31m", [], [1], {}, {"a": {}})
STEP = {
    "step": 3,
    "loss": 4.5,
    "grad_norm": 1.0,
    "lr": 0.1,
    "tokens": 300,
    "tokens_per_second": 50.0,
    "step_seconds": 2.0,
    "data_wait_seconds": 1.0,
    "flops_per_second": 3000.0,
    "flops_utilization": 0.5,
    "memory_bytes": 10,
    "memory_peak_bytes": 20,
    "feedforward_load_max": 1.5,
    "feedforward_unused_experts": 1,
}
FILES: dict[str, Any] = {
    "config.json": {
        "description": "a run",
        "model": {"sequence_length": 8, "feedforward": {"num_experts": 4, "active_experts": 2}},
        "batch": {"global_sequences": 4},
        "train": {"steps": 9},
    },
    "outcome.json": {"exit_code": 5, "reason": "why", "step": 3, "time": 1e9},
    "metrics.jsonl": STEP,
    "started": {"event": "started", "time": 1e9, "step": 0, "ranks": 2, "last_step": 9, "software": {"torch": "2"}},
    "validation": {"event": "validation", "time": 1e9, "step": 3, "split": "validation", "loss": 4.0, "loss/a": 4.0},
    "router_collapsed": {"event": "router_collapsed", "time": 1e9, "step": 3, "routers": [{"router": "blocks.0"}]},
    "checkpoint": {"event": "checkpoint", "time": 1e9, "path": "p", "seconds": 1.0, "stall_seconds": 0.1},
    "replicas_differ": {"event": "replicas_differ", "time": 1e9, "step": 3, "tensors": ["a: rank 1"], "node": "node1"},
    "hang": {"event": "hang", "time": 1e9, "message": "rank 1. More"},
}


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something may be put in the place of something else."""
    yield prefix
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*prefix, key))


def put(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(tree)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "outcome.json"):
        (folder / name).write_text(json.dumps(files[name]))
    steps = [{**STEP, "step": 1}, {**STEP, "step": 2}, files["metrics.jsonl"]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    events = [value for name, value in files.items() if "." not in name]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return folder


def check(folder: Path, cases: Iterable[tuple[str, tuple[Any, ...], Any]]) -> None:
    """A screen, a table, JSON and a comparison, all without a control sign that a terminal would obey; and what is said
    of a run that goes on, or has finished."""
    good = RunView.open(write(folder / "good", FILES))
    for name, place, value in cases:
        view = RunView.open(write(folder / "wild", {**FILES, name: put(FILES[name], place, value)}))
        try:
            shown = screen(view, width=100, now=time.time()) + runs_table([view, good], time.time())
            json.dumps(summary(view))
            shown += text(open_runs([view, good]), 1e-5)
            for sign, outcome in ((SignOfLife("process 1 on h", True, 1.0), {}), (None, {"exit_code": 0})):
                view.sign, view.outcome = sign, outcome
                shown += screen(view, width=100, now=time.time()) + runs_table([view, good], time.time())
        except UserError as error:
            shown = str(error)
        except Exception as error:
            raise AssertionError(f"{name} {'.'.join(place)} = {value!r:.40}") from error
        assert "\x1b" not in shown


CASES = [(name, place, value) for name, tree in FILES.items() for place in places(tree) for value in WILD]


def test_a_wild_value_in_every_place(tmp_path: Path) -> None:
    """One of WILD in each, and each of WILD in some."""
    some = CASES[:: len(WILD) + 1]
    assert {value if isinstance(value, str) else repr(value) for _, _, value in some} >= {"", "nan", "None", "[1]"}
    check(tmp_path, [*some, ("metrics.jsonl", ("step_seconds",), 1e300), ("config.json", ("train", "steps"), "x")])


@pytest.mark.slow  # the test above
@pytest.mark.parametrize("name", FILES)
def test_every_wild_value_in_every_place(name: str, tmp_path: Path) -> None:
    check(tmp_path, [case for case in CASES if case[0] == name])


TORN = tuple(
    itertools.product(
        ("config.json", "outcome.json", "metrics.jsonl", "events.jsonl"), (b"", b"{", b"\xff\0", b"[[", None)
    )
)


def tear(folder: Path, name: str, content: bytes | None) -> Path:
    """A run folder whose file `name` has this content; None: a folder of its name."""
    write(folder, FILES)
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    return folder


def assert_said(code: int, said: str, case: object) -> None:
    assert code == 0 or (code == 2 and said.startswith("error: ") and said.count("\n") == 1), (case, said)


def test_status_of_torn_files_and_of_folders_in_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, content) in enumerate(TORN):
        folder = tear(tmp_path / str(number), name, content)
        assert_said(pretrain.cli.status.main([str(folder)]), capsys.readouterr().err, (name, content))


@pytest.mark.slow  # the test above: both open a run with RunView
def test_comparison_of_torn_files_and_of_folders_in_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good", FILES)
    for number, (name, content) in enumerate(TORN):
        folder = tear(tmp_path / str(number), name, content)
        assert_said(pretrain.cli.compare.main([str(folder), str(good)]), capsys.readouterr().err, (name, content))
