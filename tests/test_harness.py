"""The fork server of tests/harness.py has loaded what ranks need, and may fork."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.runs import engine_trace, small_config


def test_ranks_import_nothing_large_and_the_server_that_forks_them_has_one_thread(prepared: Path) -> None:
    layouts = [("parallel.zero=1",), ("parallel.zero=3", "train.precision=bf16"), ("parallel.pipeline=2",)]
    for threads_of_server, imported in run_ranks(look, 2, [small_config(prepared, *layout) for layout in layouts]):
        assert threads_of_server == 1
        assert len(imported) < 10, f"name in tests/harness_preload.py what imports these: {sorted(imported)}"


def look(rank: int, configs: list[Config]) -> tuple[int, set[str]]:
    """The threads of the fork server, and the modules that training imports in this rank."""
    before = set(sys.modules)
    engine_trace(rank, configs, 1, ())
    return len(os.listdir(f"/proc/{os.getppid()}/task")), set(sys.modules) - before
