"""monitor.profile_steps records the steps that it names, on the ranks that it names, and changes no number."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.runs import COMPARED, metrics, small_config, train_runs


def train_and_keep_warnings(rank: int, runs: list[tuple[Config, Path]], output: Path) -> None:
    with open(output, "w") as file, contextlib.redirect_stderr(file):
        train_runs(rank, runs)


def test_the_named_steps_are_recorded_on_the_first_slice(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=4", "evaluate.sequences=0")
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    run_ranks(
        train_runs,
        2,
        [
            (small_config(prepared, *keys), plain),
            (small_config(prepared, *keys, "monitor.profile_steps=[2, 3]"), profiled),
        ],
    )
    folder = profiled / "profile" / "steps-2-3"
    assert {path.name for path in folder.iterdir()} == {"rank-00000.txt", "rank-00000.json.gz"}
    assert "aten::mm" in (folder / "rank-00000.txt").read_text()
    events = json.loads(gzip.decompress((folder / "rank-00000.json.gz").read_bytes()))["traceEvents"]
    forward = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(forward) == 2 * 2, "two steps of two micro-steps"
    assert [[row[key] for key in COMPARED] for row in metrics(profiled)] == [
        [row[key] for key in COMPARED] for row in metrics(plain)
    ]


@pytest.mark.slow  # the fast one ends where its steps do
def test_a_run_that_ends_early_writes_what_it_has(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=2", "evaluate.sequences=0", "monitor.profile_steps=[2, 9]")
    run_ranks(train_runs, 1, [(small_config(prepared, *keys), tmp_path)])
    assert (tmp_path / "profile" / "steps-2-9" / "rank-00000.txt").exists()


def test_a_disk_that_refuses_it_is_a_warning(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    keys = ("train.steps=2", "evaluate.sequences=0", "monitor.profile_steps=[1, 1]")
    run_ranks(train_and_keep_warnings, 1, [(small_config(prepared, *keys), tmp_path)], tmp_path / "err")
    assert (tmp_path / "err").read_text().startswith("warning: monitor.profile_steps: ")
    assert len(metrics(tmp_path)) == 2


def test_steps_in_the_wrong_order_are_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"^monitor.profile_steps: \[9, 4\] ends before it begins"):
        small_config(prepared, "monitor.profile_steps=[9, 4]")
