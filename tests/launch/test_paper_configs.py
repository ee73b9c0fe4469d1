"""Every published model, all its layers and its own vocabulary, takes two steps through the real entry point; slow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.shards.format import Manifest
from pretrain.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.json"))
pytestmark = pytest.mark.slow

# What launch/pretrain.py does, in a fork per run: imports take longer than two small steps, and DeepSpeed's groups
# cannot be set up twice in a process. The parent only imports: one that has computed must not fork.
DRIVER = """
import json, os, shutil, sys, traceback
sys.path[0] = sys.argv[1]
import model.openmp
import pretrain.loop
from pretrain.cli.train import main
for arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {arguments}")
    shutil.rmtree(arguments[arguments.index("--run-dir") + 1] + "/checkpoints")  # up to 4 GB each
"""


def test_every_config_takes_two_steps(prepared: Path, tmp_path: Path) -> None:
    tokens = Manifest.load(str(prepared)).tokenizer.vocab_size
    overrides = {
        "data.manifest": prepared,
        "data.max_tokens": "null",
        "model.sequence_length": 16,
        "batch.global_sequences": 4,
        "batch.micro_sequences": 2,
        "train.steps": 2,
        "evaluate.sequences": 0,
        "monitor.tensorboard": "false",
    }
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    # Enwik8's 205 rows cannot hold the tokenizer of the test; every other model keeps its own.
    rows = {path: max(tokens, load_config(path).model.vocab_size) for path in PAPER}
    runs = [
        ["--config", str(path), "--run-dir", str(tmp_path / path.stem), *sets, f"--set=model.vocab_size={rows[path]}"]
        for path in PAPER
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT)],
        input=json.dumps(runs),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=4 * 3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    for path in PAPER:
        lines = (tmp_path / path.stem / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [step["step"] for step in steps] == [1, 2], path.stem
        # Random weights: about ln(vocabulary) nats, 6 or 9.
        nats = math.log(rows[path])
        assert all(nats - 2 < step["loss"] < nats + 3 and 0 < step["grad_norm"] < 100 for step in steps), (path, steps)
