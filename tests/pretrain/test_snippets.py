"""The Python of docs/quick-start.md and docs/use.md, as it stands there, on a small run and its export.

Slow: a process of its own imports transformers. test_api.py and export/test_modeling.py test what is called.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from pretrain.cli.export import main as export
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs

PAGES = ("quick-start.md", "use.md")


@pytest.mark.slow
def test_the_snippets_of_pages_run(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(prepared, "train.steps=1", "evaluate.sequences=0", "model.sequence_length=64")
    run_ranks(train_runs, 1, [(config, tmp_path / "runs" / "mine")])
    assert export([str(tmp_path / "runs" / "mine"), "--to", str(tmp_path / "my-model")]) == 0
    settings = {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for page in PAGES:
        snippets = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
        assert snippets, page
        program = "\n".join(snippets)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{page}\n{done.stderr[-3000:]}"
        assert "The river" in done.stdout, page
