"""Two steps on one batch, as a user starts them. That a step is right, the fast tests of training hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("train.device=cpu", "batch.global_sequences=8", "schedule.warmup_steps=0")


@pytest.mark.slow
@pytest.mark.parametrize("rate, code", [(0.002, 0), (1e-30, 1)])
def test_the_second_loss_decides(prepared: Path, tmp_path: Path, rate: float, code: int) -> None:
    """A rate that changes no weight gives the same loss twice, which is refused."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    keys = (*KEYS, f"data.manifest={prepared}", f"optimizer.learning_rate={rate}")
    keys += (f"model.vocab_size={manifest['tokenizer']['vocab_size']}",)
    line = [sys.executable, "-m", "benchmarks.two_steps", "--config", "configs/switchall_tiny.json"]
    line += ["--json", str(tmp_path / "found.json"), *(part for key in keys for part in ("--set", key))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    first, second = found["losses"]
    assert (second < first) is (code == 0) and found["peak"] > found["before"] > 0 and found["estimate"] > 0
    assert ("is not below the first" in done.stderr) is (code == 1)
