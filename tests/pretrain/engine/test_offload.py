"""Optimizer states in CPU memory: the same numbers, and checkpoints that move to and from runs without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.harness import run_ranks
from tests.pretrain.runs import (
    COMPARED,
    assert_bit_identical,
    assert_same,
    engine_trace,
    metrics,
    plain_trace,
    small_config,
    train_runs,
)

OFFLOAD = "parallel.offload_optimizer=true"


def test_numbers_do_not_change(prepared: Path) -> None:
    reference = plain_trace(small_config(prepared, "batch.micro_sequences=8"), 5, (0, 2, 4))
    configs = [small_config(prepared, OFFLOAD, f"parallel.zero={zero}") for zero in (1, 2, 3)]
    for config, trace in zip(configs, run_ranks(engine_trace, 2, configs, 5, (0, 2, 4))[0], strict=True):
        assert_same(trace, reference, f"offload, ZeRO {config.parallel.zero}")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume(prepared: Path, tmp_path: Path, precision: str) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0", f"train.precision={precision}")
    runs = []
    for zero in (1, 2, 3):
        folder, stage = tmp_path / str(zero), f"parallel.zero={zero}"
        runs.append((small_config(prepared, *keys, stage, OFFLOAD), folder / "unbroken"))
        runs.append((small_config(prepared, *keys, stage, OFFLOAD, "train.stop_after_steps=3"), folder / "resumed"))
        runs.append((small_config(prepared, *keys, stage, OFFLOAD), folder / "resumed"))
        runs.append((small_config(prepared, *keys, stage, "train.stop_after_steps=3"), folder / "moved"))
        runs.append((small_config(prepared, *keys, stage, OFFLOAD), folder / "moved"))
    run_ranks(train_runs, 2, runs)
    for zero in (1, 2, 3):
        folder = tmp_path / str(zero)
        assert_bit_identical(folder / "resumed", folder / "unbroken")
        for ours, theirs in zip(metrics(folder / "moved"), metrics(folder / "unbroken"), strict=True):
            for key in COMPARED:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5 if precision == "fp32" else 2e-2), key


def test_without_sharded_states_it_is_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("set parallel.zero to 1, 2 or 3, or parallel.offload_optimizer")):
        small_config(prepared, "parallel.zero=0", OFFLOAD)
