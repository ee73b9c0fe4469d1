"""Tensor parallelism: every model of the family, alone and with data parallelism and ZeRO 0 to 3, gives the losses,
gradient norms and gradients of plain PyTorch in one process; checkpoints move between sizes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from common.errors import ConfigError
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

STEPS, GRADIENT_STEPS = 8, (0, 3, 7)


@pytest.mark.slow  # the fast tier has its layouts in test_matrix.py
@pytest.mark.parametrize("model", MODELS)
def test_every_model_gives_the_same_numbers(prepared: Path, model: str) -> None:
    # micro_batch scope: 4 sequences per micro-step in every layout.
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), STEPS, GRADIENT_STEPS)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    layouts = [(2, zero, 4) for zero in (0, 1)] if "switchall" in model else [(2, 2, 4)]
    configs = [
        config_of(prepared, model, "parallel.tensor=2", f"parallel.zero={zero}", f"batch.micro_sequences={micro}")
        for _, zero, micro in layouts
    ]
    for (_, zero, _), trace in zip(layouts, run_ranks(engine_trace, 2, configs, STEPS, GRADIENT_STEPS)[0], strict=True):
        assert_same(trace, reference, f"TP 2, ZeRO {zero}, {model}")
    zeros = (0, 1, 2, 3) if model == "switchall" else (3,)
    configs = [
        config_of(prepared, model, "parallel.tensor=2", f"parallel.zero={zero}", "batch.micro_sequences=2")
        for zero in zeros
    ]
    for zero, trace in zip(zeros, run_ranks(engine_trace, 4, configs, STEPS, GRADIENT_STEPS)[0], strict=True):
        assert_same(trace, reference, f"TP 2 x DP 2, ZeRO {zero}, {model}")


@pytest.mark.slow
def test_a_head_per_rank_by_the_gemms_of_all_experts_and_of_sets(prepared: Path) -> None:
    """The backends of SwitchHead's projections that are asked for by name, whose gradients overlap with the sum over
    ranks as those of the others do. One rank's are held by test_switchhead.py, the division by test_matrix.py."""
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), 3, (0, 2))
    keys = ("batch.micro_sequences=8", "parallel.tensor=2")
    configs = [config_of(prepared, "switchall", *keys, f"kernels.backend={backend}") for backend in ("dense", "sets")]
    for backend, trace in zip(("dense", "sets"), run_ranks(engine_trace, 2, configs, 3, (0, 2))[0], strict=True):
        assert_same(trace, reference, f"TP 2, {backend}")


@pytest.mark.slow
def test_reference_kernels_and_four_way_division(prepared: Path) -> None:
    model, sizes = "switchall", ("model.feedforward.num_experts=8", "model.vocab_size=404")
    reference = plain_trace(config_of(prepared, model, *sizes, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    keys = (*sizes, "batch.micro_sequences=8", "parallel.tensor=4")
    configs = [config_of(prepared, model, *keys, f"kernels.backend={backend}") for backend in ("reference", "cpu")]
    for trace in run_ranks(engine_trace, 4, configs, STEPS, GRADIENT_STEPS)[0]:
        assert_same(trace, reference, "TP 4")


@pytest.mark.slow
def test_bf16_stays_near_fp32_under_tensor_parallelism(prepared: Path) -> None:
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), STEPS, ())
    keys = ("parallel.tensor=2", "train.precision=bf16", "batch.micro_sequences=4")
    configs = [config_of(prepared, "switchall", *keys, f"parallel.zero={zero}") for zero in (1, 3)]
    for trace in run_ranks(engine_trace, 4, configs, STEPS, ())[0]:
        assert trace.losses != reference.losses
        assert trace.losses == pytest.approx(reference.losses, rel=2e-2)
        assert trace.grad_norms[:3] == pytest.approx(reference.grad_norms[:3], rel=0.05)


@pytest.mark.slow  # test_checkpoint_resharding.py has the fast one
def test_resume_is_bit_identical_and_moves_between_tensor_sizes(prepared: Path, tmp_path: Path) -> None:
    model = "switchall xl"
    keys = ("train.steps=8", "evaluate.every_steps=4", "evaluate.streams=5", "batch.micro_sequences=2")
    run_ranks(train_runs, 1, [(config_of(prepared, model, *keys, "parallel.zero=0"), tmp_path / "one")])
    divided = ("parallel.tensor=2", "parallel.zero=1")
    run_ranks(
        train_runs,
        4,
        [
            (config_of(prepared, model, *keys, *divided), tmp_path / "unbroken"),
            (config_of(prepared, model, *keys, *divided, "train.stop_after_steps=5"), tmp_path / "resumed"),
        ],
    )
    shutil.copytree(tmp_path / "resumed", tmp_path / "to-one")
    run_ranks(train_runs, 4, [(config_of(prepared, model, *keys, *divided), tmp_path / "resumed")])
    assert_bit_identical(tmp_path / "resumed", tmp_path / "unbroken")
    run_ranks(train_runs, 1, [(config_of(prepared, model, *keys, "parallel.zero=0"), tmp_path / "to-one")])
    back = config_of(prepared, model, *keys, "train.stop_after_steps=5", "parallel.zero=2")
    run_ranks(train_runs, 2, [(back, tmp_path / "to-two")])
    run_ranks(
        train_runs,
        2,
        [(config_of(prepared, model, *keys, "parallel.tensor=2", "parallel.zero=3"), tmp_path / "to-two")],
    )
    for name in ("unbroken", "to-one", "to-two"):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / "one"), strict=True):
            for key in (*COMPARED, "attention_load_max", "feedforward_load_max"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), f"{name}: {key} of {ours['step']}"


@pytest.mark.parametrize(
    "override, message",
    [
        ("parallel.tensor=3", "3 does not divide model.attention.num_heads = 4; set parallel.tensor to 2"),
        ("model.vocab_size=401", "2 does not divide model.vocab_size = 401; set parallel.tensor to 1, or"),
        ("model.feedforward.num_experts=5", "2 does not divide model.feedforward.num_experts = 5; set"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(prepared: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"parallel.tensor: {message}")):
        config_of(prepared, "switchall", "parallel.tensor=2", override)
