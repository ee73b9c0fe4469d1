"""Sequence parallelism inside the tensor-parallel group: the numbers of plain PyTorch in one process for every model of
the family, alone and with data parallelism and ZeRO 0 to 3; checkpoints move between layouts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from common.errors import ConfigError
from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.family import MODELS, config_of
from tests.pretrain.runs import (
    COMPARED,
    assert_bit_identical,
    assert_same,
    engine_trace,
    metrics,
    plain_trace,
    train_runs,
)

STEPS, GRADIENT_STEPS = 6, (0, 3, 5)
FEW_STEPS, FEW_GRADIENT_STEPS = 4, (0, 3)
"""Of what every commit runs."""
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
ZEROS = {2: (0, 1), 4: (0, 1, 2, 3)}
"""Ranks -> ZeRO stages."""
FAST = {("switchall xl", 4): (3,), ("moa xl", 2): (0,)}
"""What every commit runs, with its ZeRO stages; all others are as long and go to the slow tier."""


@pytest.mark.parametrize(
    "model, ranks",
    [
        pytest.param(model, ranks, marks=() if (model, ranks) in FAST else pytest.mark.slow)
        for model in MODELS
        for ranks in ZEROS
    ],
)
def test_every_model_gives_the_same_numbers(prepared: Path, model: str, ranks: int) -> None:
    is_fast = (model, ranks) in FAST
    steps, gradient_steps = (FEW_STEPS, FEW_GRADIENT_STEPS) if is_fast else (STEPS, GRADIENT_STEPS)
    # micro_batch scope: 4 sequences per micro-step in every layout.
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), steps, gradient_steps)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    micro, zeros = f"batch.micro_sequences={4 * 2 // ranks}", FAST.get((model, ranks), ZEROS[ranks])
    configs = [config_of(prepared, model, *SEQUENCE, micro, f"parallel.zero={zero}") for zero in zeros]
    for zero, trace in zip(zeros, run_ranks(engine_trace, ranks, configs, steps, gradient_steps)[0], strict=True):
        assert_same(trace, reference, f"TP 2 with SP, DP {ranks // 2}, ZeRO {zero}, {model}")


@pytest.mark.slow
def test_reference_kernels_and_four_way_division(prepared: Path) -> None:
    model, sizes = "switchall", ("model.feedforward.num_experts=8", "model.vocab_size=404", "model.dropout=0.1")
    sizes = (*sizes, "train.seed=8")
    reference = plain_trace(config_of(prepared, model, *sizes, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    keys = (*sizes, "batch.micro_sequences=8", "parallel.tensor=4", "parallel.sequence=true")
    configs = [config_of(prepared, model, *keys, f"kernels.backend={backend}") for backend in ("reference", "cpu")]
    for trace in run_ranks(engine_trace, 4, configs, STEPS, GRADIENT_STEPS)[0]:
        assert_same(trace, reference, "TP 4 with SP")


@pytest.mark.slow
def test_bf16_stays_near_fp32_under_sequence_parallelism(prepared: Path) -> None:
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), STEPS, ())
    keys = (*SEQUENCE, "train.precision=bf16", "batch.micro_sequences=4")
    configs = [config_of(prepared, "switchall", *keys, f"parallel.zero={zero}") for zero in (1, 2, 3)]
    for trace in run_ranks(engine_trace, 4, configs, STEPS, ())[0]:
        assert trace.losses != reference.losses
        assert trace.losses == pytest.approx(reference.losses, rel=2e-2)
        assert trace.grad_norms[:3] == pytest.approx(reference.grad_norms[:3], rel=0.05)


@pytest.mark.slow
def test_resume_is_bit_identical_and_moves_between_layouts(prepared: Path, tmp_path: Path) -> None:
    """With memory, of which every rank keeps its tokens, and validation over streams of uneven length. (The fast tier
    has the same with expert parallelism.)"""
    keys = ("train.steps=6", "evaluate.every_steps=3", "evaluate.streams=5", "batch.micro_sequences=2")

    def config(*layout: str) -> Config:
        return config_of(prepared, "switchall xl", *keys, *layout)

    stop, plain = "train.stop_after_steps=4", ("parallel.zero=0",)
    run_ranks(
        train_runs,
        1,
        [(config(*plain), tmp_path / "one"), (config(*plain, stop), tmp_path / "from-one")],
    )
    divided = (*SEQUENCE, "parallel.zero=1")
    run_ranks(
        train_runs,
        4,
        [(config(*divided), tmp_path / "unbroken"), (config(*divided, stop), tmp_path / "resumed")],
    )
    for copy in ("to-one", "to-tensor"):
        shutil.copytree(tmp_path / "resumed", tmp_path / copy)
    run_ranks(
        train_runs,
        4,
        [
            (config(*divided), tmp_path / "resumed"),
            (config("parallel.tensor=2", "parallel.zero=2"), tmp_path / "to-tensor"),
            (config(*SEQUENCE, "parallel.zero=3"), tmp_path / "from-one"),
        ],
    )
    run_ranks(train_runs, 1, [(config(*plain), tmp_path / "to-one")])
    assert_bit_identical(tmp_path / "resumed", tmp_path / "unbroken")
    for name in ("unbroken", "to-one", "to-tensor", "from-one"):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / "one"), strict=True):
            for key in (*COMPARED, "attention_load_max", "feedforward_load_max"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), f"{name}: {key} of {ours['step']}"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("parallel.tensor=1",), "divides the tokens over tensor-parallel ranks, but parallel.tensor is 1; set"),
        (
            ("parallel.tensor=2", "model.sequence_length=15"),
            "parallel.tensor = 2 does not divide model.sequence_length = 15; set parallel.sequence to false or "
            "model.sequence_length to 16",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(prepared: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"parallel.sequence: {message}")):
        config_of(prepared, "switchall", "parallel.sequence=true", *overrides)
