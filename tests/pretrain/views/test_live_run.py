"""A run that writes is looked at again and again: its status, its comparison and its analysis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain.cli.analyze
import pretrain.cli.compare
import pretrain.cli.status
from common.paths import REPOSITORY
from pretrain.config.loading import to_json
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs


# Fast: test_status.py, test_comparison.py and saved_model/test_loading.py, folders as they are at a moment.
@pytest.mark.slow
def test_a_run_that_goes_on(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps one checkpoint and saves at every step, so that the newest often goes while it is read. Every answer is
    a result or one sentence, from before its first step to its end, and each program succeeds meanwhile."""
    keys = ("checkpoint.every_steps=1", "checkpoint.keep_last=1", "evaluate.every_steps=5", "monitor.tensorboard=true")
    other, run = tmp_path / "other", tmp_path / "run"
    run_ranks(train_runs, 1, [(small_config(prepared, "train.steps=5"), other)])
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_json(small_config(prepared, *keys, "train.steps=100"))))
    (tmp_path / "text").write_text("a word and another word. " * 40)
    programs = {
        "status": lambda: pretrain.cli.status.main([str(run)]),
        "compare": lambda: pretrain.cli.compare.main([str(run), str(other), "--out", str(tmp_path / "compared")]),
        "analyze": lambda: pretrain.cli.analyze.main(
            [str(run), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "analysis"), "--layers", "0"]
        ),
    }
    line = [sys.executable, "launch/pretrain.py", "--config", str(config), "--run-dir", str(run)]
    process = subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    good, said = dict.fromkeys(programs, 0), set()
    try:
        while process.poll() is None:
            for name, program in programs.items():
                code = program()
                printed = capsys.readouterr()
                if code == 0:
                    good[name] += process.poll() is None
                else:
                    assert code == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
                    said.add(printed.err)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and min(good.values()) > 0, (good, said)
    assert [program() for program in programs.values()] == [0, 0, 0]
