"""A trained model for tests of the programs that use one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a SwitchAll with RoPE and a context of 16 tokens, after 1 step."""
    folder = tmp_path_factory.mktemp("trained") / "rope"
    config = small_config(prepared, "train.steps=1", "evaluate.sequences=0", "optimizer.learning_rate=0.05")
    run_ranks(train_runs, 1, [(config, folder)])
    return folder
