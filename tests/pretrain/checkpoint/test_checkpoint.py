"""Stopping and resuming: bit-identical in the same layout, equal to rounding in another one, complete and atomic."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import pretrain.segment_start
from common.errors import PassingError
from data_prep.shards.format import Manifest
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.report.board import Board
from pretrain.views.reading import RunView
from tests.harness import RankFailed, run_ranks
from tests.pretrain.family import EXPERT_DROPOUT
from tests.pretrain.report.boards import read, steps_of
from tests.pretrain.runs import (
    MOA,
    assert_bit_identical,
    curve,
    events,
    light_config,
    metrics,
    small_config,
    train_runs,
    with_a_stop,
)
from tests.pretrain.saved import rewrite_state, whole_tensors

DENSE = 'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}'
XL, ROPE = "model.position.type=xl", 'model.position={"type": "rope", "memory_chunks": 1}'
SOME = [
    ("fp32", 0, EXPERT_DROPOUT),
    ("fp32", 3, (*EXPERT_DROPOUT, ROPE)),
    ("bf16", 1, (*EXPERT_DROPOUT, XL)),
    ("fp32", 1, (MOA, "model.dropout=0.1")),
]
OTHERS = [
    *(("fp32", zero, EXPERT_DROPOUT) for zero in (1, 2)),
    *(("bf16", zero, EXPERT_DROPOUT) for zero in (2, 3)),
    ("fp32", 0, (DENSE, "model.dropout=0.1", XL)),
    ("fp32", 2, (*EXPERT_DROPOUT, XL)),
]


@pytest.mark.parametrize(
    "ranks, cases",
    [
        pytest.param(2, SOME, id="some"),
        pytest.param(2, OTHERS, id="others", marks=pytest.mark.slow),
        pytest.param(1, SOME + OTHERS, id="one rank", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_bit_identical(
    prepared: Path, tmp_path: Path, ranks: int, cases: list[tuple[str, int, tuple[str, ...]]]
) -> None:
    """Memory is kept, of streams of uneven length, and MoA's statistics, of which a lost one would alter losses."""
    runs = []
    for i, (precision, zero, model) in enumerate(cases):
        keys = (
            *model,
            "train.steps=5",
            "evaluate.every_steps=2",
            *(("evaluate.sequences=10", "evaluate.streams=5") if {XL, ROPE} & {*model} else ("evaluate.sequences=0",)),
            "checkpoint.every_steps=2",
            "optimizer.weight_decay=0.1",
            f"batch.micro_sequences={4 if precision == 'fp32' else 2}",
            f"parallel.zero={zero}",
            f"train.precision={precision}",
        )
        runs += with_a_stop(small_config(prepared, *keys), tmp_path / str(i))
    run_ranks(train_runs, ranks, runs)
    for i, (_, _, model) in enumerate(cases):
        folder = tmp_path / str(i)
        assert_bit_identical(folder / "resumed", folder / "unbroken")
        tensors = whole_tensors(list_checkpoints(folder / "resumed" / "checkpoints")[-1])
        if {XL, ROPE} & {*model}:
            held = tensors["memory/blocks.1"]
            assert held.shape == (8, 16, 24) and float(held.float().std(dim=(1, 2)).min()) > 0.1
        if MOA in model:
            kept = [tensors[f"routing/blocks.{layer}.attention.statistics/choice_share"] for layer in (0, 1)]
            assert [share.sum().item() for share in kept] == pytest.approx([1.0, 1.0])
            assert all(tensors[f"routing/blocks.{layer}.attention.statistics/gate_mean"].std() > 0 for layer in (0, 1))


def test_a_checkpoint_holds_every_element_once_and_knows_its_run(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, "train.steps=3", "evaluate.sequences=0", "parallel.zero=3")
    run_ranks(train_runs, 2, [(config, tmp_path)])
    checkpoint = Checkpoint.open(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert checkpoint.progress == Progress(3, 24, stages=(Sources.load(config).stage(),))
    manifest = Manifest.load(prepared)
    assert checkpoint.state["manifest_digest"] == manifest.digest
    assert checkpoint.state["config"]["train"]["steps"] == 3
    assert checkpoint.state["versions"]["torch"] == torch.__version__
    assert checkpoint.damaged_file(rank=0, world_size=1) is None
    tensors = whole_tensors(checkpoint.path)  # every element once
    for name, shape in checkpoint.state["parameters"].items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert tensors[f"{kind}/{name}"].shape == torch.Size(shape)
            assert tensors[f"{kind}/{name}"].dtype == torch.float32
    assert {p.suffix for p in checkpoint.path.iterdir()} == {".safetensors", ".json"}


def test_old_checkpoints_are_removed_and_metrics_have_every_step_once(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]
    # The machine stopped after step 5, in the middle of a line, and in the middle of a checkpoint.
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "checkpoints" / "step-00000006.partial").mkdir()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    superseded = [event["metrics"] for event in events(tmp_path, "superseded_metrics")]
    assert [line["step"] for line in superseded] == [5, 6]
    assert superseded[0]["loss"] == metrics(tmp_path)[4]["loss"]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_damaged_checkpoint_is_passed_over_and_said_so(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2")
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, ranks=2), tmp_path)])
    expected = curve(tmp_path)
    damaged = next((tmp_path / "checkpoints" / "step-00000006").glob("rank-00001*"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, ranks=2), tmp_path)])
    assert curve(tmp_path) == expected
    reasons = [event.get("reason", "") for event in events(tmp_path)]
    assert any("step-00000006" in r and "sha256" in r for r in reasons)


def test_a_path_starts_a_branch_and_newer_steps_are_set_aside(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ("train.steps=8", "evaluate.sequences=0", "checkpoint.every_steps=2", "checkpoint.keep_last=3")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    before = metrics(tmp_path)
    start = tmp_path / "checkpoints" / "step-00000004"
    branch = (
        *keys,
        f"checkpoint.resume={start}",
        "optimizer.learning_rate=0.002",
        'checkpoint.allow_changes=["optimizer.learning_rate"]',
    )
    run_ranks(train_runs, 1, [(light_config(prepared, *branch, "train.stop_after_steps=6"), tmp_path)])
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000006", "superseded-1-step-00000006", "superseded-1-step-00000008"}
    assert "once more" not in capfd.readouterr().out
    # The same command again continues the branch, and says how it would begin anew; auto continues it too.
    run_ranks(train_runs, 1, [(light_config(prepared, *branch, "train.stop_after_steps=7"), tmp_path)])
    assert f"the newest of what began at {start}; to begin there once more, give its step-" in capfd.readouterr().out
    for path in (tmp_path / "checkpoints").glob("step-0000000[67]"):
        path.rename(path.with_name(f"first-{path.name}"))
    run_ranks(train_runs, 1, [(light_config(prepared, *branch, "train.stop_after_steps=5"), tmp_path)])
    auto = (*keys, "optimizer.learning_rate=0.002")
    run_ranks(train_runs, 1, [(light_config(prepared, *auto), tmp_path)])
    assert "once more" not in capfd.readouterr().out
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[:4] == before[:4]
    assert rows[5]["lr"] == pytest.approx(before[5]["lr"] / 2)
    assert [event["step"] for event in events(tmp_path, "started")] == [0, 4, 6, 4, 5]


def test_a_branch_in_the_folder_of_another_run_has_no_step_loss_or_validation_of_it(
    prepared: Path, tmp_path: Path
) -> None:
    """Its spikes would be found by that run's losses, its first validation passed over, a rollback would go on from
    that run's weights, and a replay take that run's choices."""
    keys = ("train.steps=6", "evaluate.sequences=8", "evaluate.every_steps=2", "checkpoint.every_steps=2")
    board = ("monitor.tensorboard=true", "monitor.tensorboard_every_steps=1", "train.record_routing=true")
    trunk, own = tmp_path / "trunk", tmp_path / "own"
    first = light_config(prepared, *keys, "optimizer.learning_rate=0.002")
    second = light_config(prepared, *keys, *board)
    allowed = 'checkpoint.allow_changes=["optimizer"]'
    branch = light_config(prepared, *keys, allowed, f"checkpoint.resume={trunk}/checkpoints/step-00000004", *board)
    killed = branch.replaced("train", stop_after_steps=5).replaced("checkpoint", every_steps=100)
    run_ranks(train_runs, 1, [(first, trunk), (second, own), (killed, own)])
    shutil.rmtree(own / "checkpoints" / "step-00000005")  # as if it had been killed before
    run_ranks(train_runs, 1, [(branch, own)])
    assert [row["step"] for row in metrics(own)] == [5, 6]
    assert [event["metrics"]["step"] for event in events(own, "superseded_metrics")] == [*range(1, 7), 5]
    assert [event["step"] for event in events(own, "branch")] == [4]
    assert [event["step"] for event in events(own, "validation")] == [2, 4, 6, 4, 5, 6]
    assert [step for step, _ in RunView.open(own).validations()] == [4, 6]
    names = sorted(path.name for path in (own / "checkpoints").iterdir())
    assert names == ["step-00000006", *(f"superseded-1-step-0000000{step}" for step in (2, 4, 6))]
    assert steps_of(read(own / "tensorboard"), "loss/train") == [5, 6]
    assert sorted(path.name for path in (own / "routing").glob("step-*")) == ["step-00000005", "step-00000006"]
    # A branch of the folder's own course, and of a copy of it, keeps what came before.
    again = light_config(prepared, *keys, allowed, f"checkpoint.resume={trunk}/checkpoints/step-00000002")
    copy = Path(shutil.copytree(trunk, tmp_path / "copy"))
    run_ranks(train_runs, 1, [(again, trunk), (again, copy)])
    for folder in (trunk, copy):
        assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6] and not events(folder, "branch")


def _killed(rank: int, config: Config, run_dir: Path, moment: str) -> None:
    """A start that dies when it has moved the lines of another branch, or with its first points not yet written."""
    if moment == "before the boards":
        dead = patch.object(pretrain.segment_start, "Monitor", side_effect=OSError(errno.EIO, "dead"))
        with dead, pytest.raises(PassingError, match="dead"):
            train_runs(rank, [(config, run_dir)])
        return
    with patch.object(Board, "add"):
        train_runs(rank, [(config, run_dir)])
    shutil.rmtree(run_dir / "checkpoints" / "step-00000003")


@pytest.mark.parametrize("moment", ["before the boards", "before the first points are written"])
def test_curves_of_another_branch_are_hidden_whenever_the_start_of_one_is_killed(
    prepared: Path, tmp_path: Path, moment: str
) -> None:
    keys = ("train.steps=4", "evaluate.sequences=0", "checkpoint.every_steps=2", "monitor.tensorboard_every_steps=1")
    trunk, own = tmp_path / "trunk", tmp_path / "own"
    board = (*keys, "monitor.tensorboard=true")
    first = light_config(prepared, *keys, "optimizer.learning_rate=0.002", "train.stop_after_steps=2")
    named = ('checkpoint.allow_changes=["optimizer"]', f"checkpoint.resume={trunk}/checkpoints/step-00000002")
    branch = light_config(prepared, *board, *named)
    run_ranks(train_runs, 1, [(first, trunk), (light_config(prepared, *board), own)])
    run_ranks(_killed, 1, branch.replaced("train", stop_after_steps=3), own, moment)
    run_ranks(train_runs, 1, [(branch, own)])
    assert [event["step"] for event in events(own, "branch")] == [2]
    for folder, tag in (("", "loss/train"), ("against tokens", "loss against tokens/train")):
        assert len(steps_of(read(own / "tensorboard" / folder), tag)) == 2, "steps 3 and 4 alone"


def test_checkpoints_that_cannot_be_used_never_mean_starting_over(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=4", "evaluate.sequences=0", "checkpoint.every_steps=2")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    elsewhere = light_config(prepared, *keys, f"checkpoint.resume={tmp_path}")
    with pytest.raises(RankFailed, match=r"is a run folder, not a checkpoint; .* set it to .*step-00000004"):
        run_ranks(train_runs, 1, [(elsewhere, tmp_path / "new")])
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        next(folder.glob("rank-*")).write_bytes(b"")
    with pytest.raises(RankFailed, match=r"no checkpoint is whole .*0 bytes"):
        run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        rewrite_state(folder, lambda state: state.update(format_version=99))
    with pytest.raises(RankFailed, match="format 99"):
        run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    assert len(metrics(tmp_path)) == 4


def test_a_changed_batch_continues_the_data_where_it_was(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys, "train.stop_after_steps=4"), tmp_path)])
    changed = ("batch.global_sequences=16", 'checkpoint.allow_changes=["batch"]')
    run_ranks(train_runs, 1, [(light_config(prepared, *keys, *changed), tmp_path)])
    assert [row["tokens"] // 16 for row in metrics(tmp_path)] == [8, 16, 24, 32, 48, 64]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_fp16_skips_overflows_and_resumes_with_its_loss_scale(prepared: Path, tmp_path: Path, ranks: int) -> None:
    """fp16 is refused on the CPU by the command line; its machinery is tested here all the same."""
    # From 2^28 (DeepSpeed starts at 2^16) gradients overflow: skipped steps must halve the scale, not end the run.
    keys = ("train.steps=14", "evaluate.sequences=0", "train.precision=fp16", "parallel.zero=1", *EXPERT_DROPOUT)
    runs = with_a_stop(small_config(prepared, *keys), tmp_path, after=6)
    run_ranks(_train_runs_at_a_high_loss_scale, ranks, runs)
    assert_bit_identical(tmp_path / "resumed", tmp_path / "unbroken")
    rows = metrics(tmp_path / "resumed")
    skipped = [row for row in rows if row["grad_norm"] is None]
    assert 0 < len(skipped) < len(rows)
    assert rows[-1]["loss_scale"] < 2**28
    assert rows[-1]["loss"] < rows[0]["loss"]


def _train_runs_at_a_high_loss_scale(rank: int, runs: list[tuple[Config, Path]]) -> None:
    from deepspeed.accelerator import get_accelerator

    import pretrain.engine.build

    # DeepSpeed refuses fp16 on a CPU without AVX512-FP16, where torch computes it in software: the same machinery.
    get_accelerator().is_fp16_supported = lambda: True
    derive = pretrain.engine.build.deepspeed_json

    def derive_with_high_scale(config: Config, data_size: int) -> dict[str, Any]:
        tree = derive(config, data_size)
        tree["fp16"].update(initial_scale_power=28, hysteresis=1)
        return tree

    pretrain.engine.build.deepspeed_json = derive_with_high_scale
    train_runs(rank, runs)
