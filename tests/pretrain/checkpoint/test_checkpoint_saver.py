"""Saving behind the training: the state of the step it is named after, in files of its size, and what is kept."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.multiprocessing.reductions import StorageWeakRef

import pretrain.checkpoint.folder
import pretrain.checkpoint.saver
from common.errors import UserError
from common.resident import forget_peak, resident_bytes
from pretrain.checkpoint import Checkpoint, Retention, list_checkpoints
from pretrain.checkpoint.fragments import single_fragment
from pretrain.checkpoint.loading import load_training_state
from pretrain.checkpoint.planners import AgreedPlan, SavePlanner
from pretrain.checkpoint.saver import THREAD_NAME, Saver, _remove_old, drained
from pretrain.checkpoint.storage import Writer
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.runs import events, light_config, one_step, small_config, train_runs, trainer_of
from tests.pretrain.saved import whole_tensors


def train_while_a_save_waits(rank: int, config: Config, run_dir: Path) -> list[int]:
    """Holds every write back until the training has done two more steps. Returns the steps done when each began."""
    taken, began = [0], []
    condition = threading.Condition()
    launch, write = Trainer.launch, Writer.write_data

    def counted(self: Trainer, *args: Any, **options: Any) -> Any:
        result = launch(self, *args, **options)
        with condition:
            taken[0] += 1
            condition.notify_all()
        return result

    def held(self: Writer, *args: Any, **options: Any) -> Any:
        saved = int(self.final.name.removeprefix("step-"))
        with condition:
            wanted = min(saved + 2, config.train.steps)
            assert condition.wait_for(lambda: taken[0] >= wanted, timeout=60), "training waited for the write"
            began.append(taken[0])
        return write(self, *args, **options)

    Trainer.launch, Writer.write_data = counted, held
    train_runs(rank, [(config, run_dir)])
    return began


def test_the_state_is_of_its_step_though_training_goes_on(prepared: Path, tmp_path: Path) -> None:
    keys = ("model.position.type=xl", "train.steps=9", "evaluate.sequences=0", "checkpoint.every_steps=3")
    at_once = light_config(prepared, *keys, "checkpoint.asynchronous=false", ranks=2)
    run_ranks(train_runs, 2, [(at_once, tmp_path / "at once")])
    behind = light_config(prepared, *keys, ranks=2)
    began = run_ranks(train_while_a_save_waits, 2, behind, tmp_path / "behind")
    # Before a write has noted how far the training is, that may be at the next save, which waits for this one.
    assert all(first in (5, 6) and second in (8, 9) and third == 9 for first, second, third in began), began
    for step in (3, 6, 9):
        ours, theirs = (tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("behind", "at once"))
        found, expected = whole_tensors(ours), whole_tensors(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def save_four_times(rank: int, config: Config, folder: Path) -> list[int]:
    """How many rectangles this rank sends to the first one at each save; from the third on the second rank has one
    more."""
    trainer, sent = trainer_of(config), []
    create = SavePlanner.create_local_plan

    def created(self: SavePlanner) -> Any:
        plan = create(self)
        sent.append(len(plan.items))
        return plan

    SavePlanner.create_local_plan = created
    owned = pretrain.checkpoint.saver.owned_state

    def owned_and_more(*args: Any, **options: Any) -> Any:
        return owned(*args, **options) | {"more": single_fragment(torch.arange(5.0))}

    for step in range(4):
        if step == 2 and rank == 1:
            pretrain.checkpoint.saver.owned_state = owned_and_more
        one_step(trainer, Progress(step, 8 * step))
        trainer.saver.save(folder, Progress(step, 8 * step), extra={}, retention=Retention(keep_last=9))
        trainer.saver.finish()
    drawn = torch.rand(3)  # by code that a user adds
    load_training_state(Checkpoint.open(folder / "step-00000003"), trainer.engine, trainer.setup.parallel)
    assert torch.equal(torch.rand(3), drawn)
    trainer.engine.destroy()
    return sent


def test_a_plan_is_made_once_and_again_where_a_rank_has_more_to_save(prepared: Path, tmp_path: Path) -> None:
    first, second = run_ranks(save_four_times, 2, small_config(prepared), tmp_path)
    assert first[0] > 30 and first[1:] == [0, 0, 0]
    assert second[0] > 30 and second[1:] == [0, second[0] + 1, 0]
    folders = list_checkpoints(tmp_path)
    states = [whole_tensors(folder) for folder in folders]
    assert [("more" in state) for state in states] == [False, False, True, True]
    weight = min(name for name in states[0] if name.startswith("master/blocks."))
    assert not torch.equal(states[1][weight], states[3][weight])
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.damaged_file() is None and len(checkpoint.state["files"]) == 3


def save_after_a_plan_that_failed(rank: int, config: Config, folder: Path) -> None:
    """With a memory of text, say; without it while the disk is full; and with it again."""
    trainer, owned = trainer_of(config), pretrain.checkpoint.saver.owned_state

    def owned_and_more(*args: Any, **options: Any) -> Any:
        return owned(*args, **options) | {"more": single_fragment(torch.arange(5.0))}

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(3):
        pretrain.checkpoint.saver.owned_state = owned if step == 1 else owned_and_more
        before = refuse if step == 1 else lambda: None
        kept = Retention(keep_last=9)
        trainer.saver.save(folder, Progress(step, 8 * step), extra={}, retention=kept, before=before)
        trainer.saver.wait()
    trainer.saver.finish()
    trainer.engine.destroy()


def test_a_plan_that_was_agreed_on_in_a_failed_save_is_no_rank_s_plan(prepared: Path, tmp_path: Path) -> None:
    """The ranks had not heard of it, and what it lacks would be in no index: silently lost."""
    run_ranks(save_after_a_plan_that_failed, 1, light_config(prepared), tmp_path)
    states = [whole_tensors(folder) for folder in list_checkpoints(tmp_path)]
    assert [("more" in state) for state in states] == [True, True]


def save_again(rank: int, config: Config, folder: Path) -> tuple[list[tuple[int, bool]], list[bool]]:
    """What each save reports, and whether the numbers that torch draws go on where they were saved."""
    trainer, outcomes = trainer_of(config), list[tuple[int, bool]]()

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(step: int, before: Callable[[], None] = lambda: None) -> None:
        trainer.saver.save(
            folder,
            Progress(step, 8 * step),
            extra={},
            retention=Retention(keep_last=9),
            before=before,
            report=lambda outcome: outcomes.append((outcome.step, outcome.error is None)),
        )
        trainer.saver.wait()

    save(1)
    save(1)
    save(2, refuse)
    torch.manual_seed(31)
    save(2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    load_training_state(Checkpoint.open(list_checkpoints(folder)[-1]), trainer.engine, trainer.setup.parallel)
    return outcomes, torch.eq(torch.rand(3), drawn).tolist()


def test_a_step_is_saved_once_and_again_only_where_it_failed(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, "checkpoint.asynchronous=false")
    [(outcomes, goes_on)] = run_ranks(save_again, 1, config, tmp_path)
    assert outcomes == [(1, True), (2, False), (2, True)] and all(goes_on)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("error", [ValueError("a mistake"), RuntimeError("Connection closed by peer")])
def test_an_error_that_is_no_fault_of_the_disk_ends_the_save(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours, or a lost rank, is no full disk: nobody is told to make room, and what is there stays."""
    saver, writer = object.__new__(Saver), Writer(tmp_path / "step-00000001", {})
    saver._group = None
    writer.partial.mkdir()

    def failing(*args: Any, **options: Any) -> None:
        raise CheckpointException("save", {1: (error, None)})  # type: ignore[dict-item]

    monkeypatch.setattr(dcp, "save", failing)
    with pytest.raises(CheckpointException):
        saver._write({}, writer, AgreedPlan())
    assert writer.partial.exists()


def test_a_folder_that_cannot_be_listed_is_a_warning_and_no_other_end_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first rank alone it would end the run: the others, whose save has ended well, go on."""

    def unread(folder: Path) -> list[Path]:
        raise UserError("--run-dir: checkpoints cannot be read: Input/output error")

    for module in (pretrain.checkpoint.saver, pretrain.checkpoint.folder):
        monkeypatch.setattr(module, "list_checkpoints", unread)
    _remove_old(tmp_path, Retention(keep_last=1))
    assert "an old checkpoint cannot be removed: --run-dir: checkpoints cannot be read" in capsys.readouterr().err

    def full(*args: Any, **options: Any) -> None:
        raise CheckpointException("save", {1: (OSError(errno.ENOSPC, "No space left on device"), None)})  # type: ignore[dict-item]

    saver = object.__new__(Saver)
    saver._group = None
    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    said = saver._write({}, Writer(tmp_path / "step-00000001", {}), AgreedPlan())
    assert type(said) is UserError
    assert "rank 1 could not save" in str(said) and str(said).endswith("Input/output error)")


def test_however_training_ends_its_saves_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their collectives need the process group, and their files the lock of the folder."""
    joined: list[str] = []
    threads = [SimpleNamespace(name=name, join=partial(joined.append, name)) for name in ("MainThread", THREAD_NAME)]
    monkeypatch.setattr(threading, "enumerate", lambda: threads)
    with drained():
        pass
    with pytest.raises(KeyError), drained():
        raise KeyError
    assert joined == [THREAD_NAME] * 2


def save_large(rank: int, config: Config, folder: Path) -> tuple[int, int]:
    """Bytes of master weights and moments over all ranks, and the memory that saving them took on this one."""
    trainer = trainer_of(config)
    trainer.saver.save(folder, Progress(0, 0), extra={}, retention=Retention(keep_last=1))  # moments are there now
    trainer.saver.finish()
    forget_peak()
    before, _ = resident_bytes()
    trainer.saver.save(folder, Progress(1, 0), extra={}, retention=Retention(keep_last=1))
    trainer.saver.finish()
    return 12 * sum(p.numel() for p in trainer.engine.module.parameters()), resident_bytes()[1] - before


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_large_state_is_saved_in_its_size_and_little_memory(
    prepared: Path, tmp_path: Path, asynchronous: str
) -> None:
    """200 MB on two ranks: the buffer of an asynchronous save is there from the start, another save has none."""
    config = small_config(
        prepared,
        "model.d_model=512",
        "model.attention.head_dim=64",
        'model.feedforward={"type": "sigma_moe", "num_experts": 64, "expert_size": 128, "active_experts": 2}',
        f"checkpoint.asynchronous={asynchronous}",
    )
    results = run_ranks(save_large, 2, config, tmp_path)
    size = results[0][0]
    files = sum(file.stat().st_size for file in list_checkpoints(tmp_path)[0].iterdir())
    assert size >= 200e6
    assert size <= files <= 1.05 * size
    assert all(memory < 50e6 for _, memory in results), results


def asked_for(rank: int, config: Config, folder: Path) -> list[tuple[int, bool]]:
    """Bytes of each buffer that the saver of a run asks for, and whether the one before was free by then."""
    make, before, asked = pretrain.checkpoint.saver.host_buffer, [], []  # type: Any, list[Any], list[tuple[int, bool]]

    def making(num_bytes: int, device: torch.device) -> torch.Tensor:
        asked.append((num_bytes, all(one.expired() for one in before)))
        buffer: torch.Tensor = make(num_bytes, device)
        before.append(StorageWeakRef(buffer.untyped_storage()))
        return buffer

    pretrain.checkpoint.saver.host_buffer = making  # this process ends with the test
    train_runs(rank, [(config, folder)])
    return asked


def test_a_buffer_that_is_too_small_is_freed_before_the_next(prepared: Path, tmp_path: Path) -> None:
    """The memory of Transformer-XL is empty at the start."""
    config = light_config(prepared, "model.position.type=xl", "train.steps=2", "evaluate.sequences=0")
    [[(first, _), (second, was_free)]] = run_ranks(asked_for, 1, config, tmp_path)
    assert first < second and was_free


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Checkpoints of steps 100, 200 ... 800, with a validation loss at every second one."""
    losses = {200: 3.0, 400: 2.5, 600: 2.75, 800: 2.5}
    for step in range(100, 900, 100):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"validation_loss": losses.get(step)}))
    return list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "rules, steps",
    [
        ({"keep_last": 2}, {700, 800}),
        ({"keep_last": 1, "keep_every_steps": 300}, {300, 600, 800}),
        ({"keep_last": 1, "keep_best": 1}, {400, 800}),
        ({"keep_last": 1, "keep_best": 3}, {400, 600, 800}),
        ({"keep_last": 2, "keep_every_steps": 500, "keep_best": 9}, {200, 400, 500, 600, 700, 800}),
        ({"keep_last": 20}, set(range(100, 900, 100))),
    ],
)
def test_retention(saved: list[Path], rules: dict[str, int], steps: set[int]) -> None:
    Retention(**rules).apply(saved[0].parent)
    assert {int(path.name.removeprefix("step-")) for path in list_checkpoints(saved[0].parent)} == steps
    assert not list(saved[0].parent.glob("*.partial"))


def stage_of(*weights: int, digest: str = "a") -> dict[str, Any]:
    sources = [{"digest": f"{digest}{number}", "weight": weight} for number, weight in enumerate(weights)]
    return {"progress": {"stages": [{"sources": [{"digest": "first", "weight": 1}]}, {"sources": sources}]}}


def streams_of(number: int, memory: int = 1) -> dict[str, Any]:
    return {"config": {"model": {"position": {"memory_chunks": memory}}, "evaluate": {"streams": number}}}


@pytest.mark.parametrize(
    "before, after, is_kept",
    [
        ({}, {"config": {"evaluate": {"split": "test"}}}, True),
        ({}, {"config": {"model": {"sequence_length": 64}}}, True),
        ({"manifest_digest": "a0"}, {"manifest_digest": "b0"}, True),
        (stage_of(1, 2), stage_of(1, 2, digest="b"), True),
        # The same windows, whatever the weights, and a file from before stages were recorded.
        ({"manifest_digest": "x", **stage_of(1, 2)}, {"manifest_digest": "y", **stage_of(3, 1)}, False),
        ({"manifest_digest": "a0"}, {"manifest_digest": "a0", **stage_of(1, 0)}, False),
        (streams_of(4), streams_of(8), True),
        (streams_of(4, memory=0), streams_of(8, memory=0), False),
    ],
    ids=["split", "length", "data", "sources", "weights", "record of stages", "streams", "streams without memory"],
)
def test_losses_of_other_text_do_not_compete(
    saved: list[Path], before: dict[str, Any], after: dict[str, Any], is_kept: bool
) -> None:
    """From step 500 on a resume has changed what is validated, and losses are lower: the best before that, of step 400,
    is kept."""
    losses = {4: 2.5, 6: 1.75, 7: 1.5, 8: 1.625}
    for number, path in enumerate(saved, 1):
        state = {"validation_loss": losses.get(number), **(before if number < 5 else after)}
        (path / "state.json").write_text(json.dumps(state))
    Retention(keep_last=1, keep_best=1).apply(saved[0].parent)
    expected = [f"step-00000{n}00" for n in ((4, 7, 8) if is_kept else (7, 8))]
    assert [path.name for path in list_checkpoints(saved[0].parent)] == expected


def test_a_run_keeps_what_its_configuration_says(prepared: Path, tmp_path: Path) -> None:
    keys = (
        "train.steps=8",
        "evaluate.sequences=8",
        "evaluate.every_steps=2",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=1",
    )
    keep = ("checkpoint.keep_every_steps=3", "checkpoint.keep_best=2", "optimizer.learning_rate=1.0")
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, *keep, ranks=2), tmp_path)])
    losses = {event["step"]: event["loss"] for event in events(tmp_path, "validation")}
    assert sorted(losses) == [2, 4, 6, 8]
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert not set(best) <= {3, 6, 8}, "all of them are kept for another reason"
    paths = list_checkpoints(tmp_path / "checkpoints")
    assert {int(path.name.removeprefix("step-")) for path in paths} == {3, 6, 8, *best}
    for path in paths:
        checkpoint = Checkpoint.open(path)
        assert checkpoint.state["validation_loss"] == losses.get(checkpoint.progress.step)
    written = events(tmp_path, "checkpoint")
    assert [e["step"] for e in written] == list(range(1, 9))
    assert all(0 < e["stall_seconds"] <= e["seconds"] for e in written)
