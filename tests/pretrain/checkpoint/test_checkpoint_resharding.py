"""A checkpoint of any layout continues bit by bit in the same one, and in any other one: what is loaded is what was
saved, bit by bit, and the next losses, gradient norms and validations are those of the run that was never stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import Checkpoint, Retention, list_checkpoints
from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import (
    TOLERANCE,
    assert_bit_identical,
    assert_same_metrics,
    events,
    metrics,
    plain_trace,
    train_runs,
    trainer_of,
)
from tests.pretrain.saved import whole_tensors

SAVED_AT = 3
EVERYTHING = Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2, zero=1)
OTHERS = {
    "one process": Layout(),
    "DP4 ZeRO-3": Layout(data=4, zero=3),
    "TP2 DP2": Layout(tensor=2, data=2, zero=2),
    "PP4": Layout(pipeline=4),
}
SEEDS = {
    ("switchall", replace(EVERYTHING, tied=True), True): 5,
    ("switchall xl", EVERYTHING, False): 41,
    ("moa", EVERYTHING, True): 5,
    ("dense, grouped queries", Layout(tensor=2, sequence=True, pipeline=2, data=2), True): 17,
}
"""Model, layout and dropouts; as those of matrix.py, over 8 steps."""


def load_and_save(rank: int, config: Config, source: Path, target: Path) -> None:
    """A checkpoint as this layout holds it, saved again before any step."""
    checkpoint = Checkpoint.open(source)
    trainer = trainer_of(config, checkpoint)
    trainer.saver.save(target, checkpoint.progress, extra={}, retention=Retention(keep_last=9))
    trainer.saver.finish()
    trainer.engine.destroy()


def load_save_train(rank: int, tasks: list[tuple[Config, Path, Path]], runs: list[tuple[Config, Path]]) -> None:
    for task in tasks:
        load_and_save(rank, *task)
    train_runs(rank, runs)


def assert_same_state(ours: Path, theirs: Path, *, tied: bool, routed: bool) -> None:
    """Bit by bit, but for the generators of another number of ranks and a last stage's copy of a tied embedding."""
    kinds = ("master/", "exp_avg/", "exp_avg_sq/", "memory/", "routing/")
    found, expected = (whole_tensors(list_checkpoints(folder)[-1], prefixes=kinds) for folder in (ours, theirs))
    if tied:
        for name in (f"{kind}head.weight" for kind in kinds[:3]):
            found.pop(name, None)
            expected.pop(name, None)
    assert found.keys() == expected.keys()
    wanted = {"master/", "exp_avg/", "exp_avg_sq/"} | ({"routing/"} if routed else set())
    assert {name.partition("/")[0] + "/" for name in found} >= wanted
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    opened = [Checkpoint.open(list_checkpoints(folder)[-1]).state for folder in (ours, theirs)]
    assert opened[0]["optimizer_steps"] == opened[1]["optimizer_steps"] == SAVED_AT


def validations(run_dir: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run_dir, "validation")}


def stop_and_resume(rank: int, whole: Config, stopped: Config, folder: Path) -> None:
    """Runs in `unbroken`, `saved`, which stops, and `resumed`, which begins as that."""
    train_runs(rank, [(whole, folder / "unbroken"), (stopped, folder / "saved")])
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(folder / "saved", folder / "resumed")
    torch.distributed.barrier()
    train_runs(rank, [(whole, folder / "resumed")])


def check(
    prepared: Path,
    tmp_path: Path,
    model: str,
    home: Layout,
    with_dropouts: bool,
    seed: int,
    steps: int,
    others: dict[str, Layout],
) -> None:
    """Validation is over streams of uneven length."""
    evaluation = ("evaluate.every_steps=2", "evaluate.streams=5", "evaluate.sequences=12")

    def config(layout: Layout, *more: str) -> Config:
        keys = (f"train.stop_after_steps={steps}", f"train.seed={seed}", *evaluation, *more)
        return config_of(prepared, model, replace(layout, tied=home.tied), *keys, with_dropouts=with_dropouts)

    assert plain_trace(config(Layout(micro=8)), steps, ()).smallest_margin > 1e-5
    stop = f"train.stop_after_steps={SAVED_AT}"
    run_ranks(stop_and_resume, home.ranks, config(home), config(home, stop), tmp_path, timeout_seconds=900)
    assert_bit_identical(tmp_path / "resumed", tmp_path / "unbroken")
    saved = list_checkpoints(tmp_path / "saved" / "checkpoints")[-1]
    for ranks in sorted({layout.ranks for layout in others.values()}):
        tasks, runs = [], []
        for name, layout in others.items():
            if layout.ranks == ranks:
                tasks.append((config(layout), saved, tmp_path / f"{name} again"))
                shutil.copytree(tmp_path / "saved", tmp_path / f"to {name}")
                runs.append((config(layout), tmp_path / f"to {name}"))
                runs.append((config(layout, stop), tmp_path / f"from {name}"))
        run_ranks(load_save_train, ranks, tasks, runs, timeout_seconds=900)
    back = [(config(home), tmp_path / f"from {name}") for name in others]
    tasks = [
        (config(home), list_checkpoints(tmp_path / f"from {n}" / "checkpoints")[-1], tmp_path / f"back {n}")
        for n in others
    ]
    run_ranks(load_save_train, home.ranks, tasks, back, timeout_seconds=900)
    for name in others:
        again, routed = tmp_path / f"{name} again", not model.startswith("dense")
        assert_same_state(again, tmp_path / "saved" / "checkpoints", tied=home.tied, routed=routed)
        for run in (f"to {name}", f"from {name}"):
            assert_same_metrics(tmp_path / run, tmp_path / "unbroken")
            found, expected = validations(tmp_path / run), validations(tmp_path / "unbroken")
            later = {step: loss for step, loss in expected.items() if step > SAVED_AT}
            assert {step: found[step] for step in later} == pytest.approx(later, rel=TOLERANCE), run
    assert len(metrics(tmp_path / "unbroken")) == steps and len(later) == (steps - SAVED_AT + 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize("model, home, with_dropouts", SEEDS)
def test_every_dimension_to_others_and_back(
    prepared: Path, tmp_path: Path, model: str, home: Layout, with_dropouts: bool
) -> None:
    check(prepared, tmp_path, model, home, with_dropouts, SEEDS[model, home, with_dropouts], 8, OTHERS)


def test_some_dimensions(prepared: Path, tmp_path: Path) -> None:
    """Sequence-parallel stages with memory, to data-parallel ranks that share everything out."""
    home, seed = Layout(tensor=2, sequence=True, pipeline=2, micro=4), 4
    check(prepared, tmp_path, "switchall xl", home, True, seed, 4, {"DP2 ZeRO-3": Layout(data=2, zero=3)})
