"""What a checkpoint refuses to be resumed with, what may change, and which folders are checkpoints at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data_prep.shards.format import Manifest
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.resume import changed_settings, environment_changes
from tests.corpus import with_another_tokenizer
from tests.harness import RankFailed, run_ranks
from tests.pretrain.runs import curve, light_config, metrics, small_config, train_runs
from tests.pretrain.saved import rewrite_state


@pytest.fixture(scope="module")
def stopped_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped")
    config = light_config(prepared, "train.steps=6", "evaluate.sequences=0", "train.stop_after_steps=2")
    run_ranks(train_runs, 1, [(config, run_dir)])
    return run_dir


@pytest.mark.parametrize(
    "override, key",
    [
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate"),
        ("model.feedforward.active_experts=3", "model.feedforward.active_experts"),
        ("schedule.warmup_steps=2", "schedule.warmup_steps"),
        ("batch.global_sequences=16", "batch.global_sequences"),
        ("train.steps=9", "train.steps"),
        ("train.seed=5", "train.seed"),
    ],
)
def test_a_changed_setting_is_refused_by_name_unless_allowed(
    stopped_run: Path, prepared: Path, tmp_path: Path, override: str, key: str
) -> None:
    checkpoint = Checkpoint.open(list_checkpoints(stopped_run / "checkpoints")[-1])
    digest = Manifest.load(prepared).digest
    keys = ("train.steps=6", "evaluate.sequences=0")
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as refusal:
        changed_settings(light_config(prepared, *keys, override), checkpoint, digest)
    assert "checkpoint.allow_changes" in str(refusal.value)
    allowed = light_config(prepared, *keys, override, f'checkpoint.allow_changes=["{key}"]')
    assert key in changed_settings(allowed, checkpoint, digest)


def test_data_of_another_tokenizer_are_refused_whatever_is_allowed(
    stopped_run: Path, prepared: Path, tmp_path: Path
) -> None:
    """The same numbers would mean other pieces, and nothing but the loss would show it."""
    with_another_tokenizer(prepared, tmp_path / "other")
    run = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    keys = ("train.steps=6", "evaluate.sequences=0", 'checkpoint.allow_changes=["data.manifest"]')
    with pytest.raises(RankFailed, match=r"data\.manifest: was made with another tokenizer .*begin a new run"):
        run_ranks(train_runs, 1, [(light_config(tmp_path / "other", *keys), run)])
    shutil.copytree(prepared, tmp_path / "moved")
    run_ranks(train_runs, 1, [(light_config(tmp_path / "moved", *keys), run)])
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_change_of_sizes_is_refused_without_advice_that_cannot_help(stopped_run: Path, prepared: Path) -> None:
    checkpoint = Checkpoint.open(list_checkpoints(stopped_run / "checkpoints")[-1])
    digest, keys = Manifest.load(prepared).digest, ("train.steps=6", "evaluate.sequences=0")
    for override in ("model.feedforward.expert_size=40", "model.num_layers=4"):
        with pytest.raises(UserError, match="the saved weights have other sizes, so the change cannot") as refusal:
            changed_settings(light_config(prepared, *keys, override), checkpoint, digest)
        assert "allow_changes" not in str(refusal.value)


def test_a_run_whose_past_does_not_depend_on_its_length_is_extended(prepared: Path, tmp_path: Path) -> None:
    """2 of 2 steps at a constant rate, then on to 4 with a decay at the end: bit by bit the run of 4 from the start."""
    common = ("evaluate.sequences=0", "schedule.warmup_steps=0")
    constant, extended = (*common, "schedule.shape=constant"), (*common, "schedule.shape=wsd", "schedule.decay_steps=2")
    through = (light_config(prepared, *extended, "train.steps=4"), tmp_path / "through")
    run_ranks(train_runs, 1, [through, (light_config(prepared, *constant, "train.steps=2"), tmp_path / "extended")])
    run_ranks(train_runs, 1, [(light_config(prepared, *extended, "train.steps=4"), tmp_path / "extended")])
    assert curve(tmp_path / "extended") == curve(tmp_path / "through")
    assert [row["lr"] for row in metrics(tmp_path / "extended")] == [0.004, 0.004, 0.004, 0.002]
    with pytest.raises(RankFailed, match=r"train\.steps: was 4 .* before wsd's decay"):
        run_ranks(train_runs, 1, [(light_config(prepared, *extended, "train.steps=9"), tmp_path / "extended")])


def test_a_key_younger_than_the_checkpoint_has_its_default(stopped_run: Path, prepared: Path, tmp_path: Path) -> None:
    """Also where several kinds of a section have it, each with its own default."""
    folder = tmp_path / "step-00000002"
    shutil.copytree(list_checkpoints(stopped_run / "checkpoints")[-1], folder)
    young = {"model": ["initialization"], "schedule": ["shape", "decay_steps", "decay"]}

    def forget(state: dict[str, Any]) -> None:
        for section, keys in young.items():
            for key in keys:
                del state["config"][section][key]
        del state["config"]["model"]["attention"]["expert_dropout"]  # moa has it too

    rewrite_state(folder, forget)
    config = light_config(prepared, "train.steps=6", "evaluate.sequences=0")
    changes = changed_settings(config, Checkpoint.open(folder), Manifest.load(prepared).digest)
    assert set(changes) == {"train.stop_after_steps"}


def test_layout_machine_logging_and_stop_settings_may_change(stopped_run: Path, prepared: Path) -> None:
    checkpoint = Checkpoint.open(list_checkpoints(stopped_run / "checkpoints")[-1])
    free = (
        "parallel.zero=3",
        "train.stop_after_steps=4",
        "train.threads=2",
        "monitor.print_every_steps=3",
        "checkpoint.every_steps=9",
        "evaluate.every_steps=4",
        "data.verify=full",
    )
    config = light_config(prepared, "train.steps=6", "evaluate.sequences=0", *free)
    changes = changed_settings(config, checkpoint, Manifest.load(prepared).digest)
    assert set(changes) >= {entry.partition("=")[0] for entry in free}


@pytest.mark.parametrize(
    "scope, micro, ranks, told",
    [
        ("micro_batch", 2, 2, [(8, 4)]),
        ("micro_batch", 4, 2, []),  # the same product, otherwise divided
        ("global_batch", 2, 2, []),
    ],
)
def test_another_batch_of_a_regulariser_is_told(
    stopped_run: Path, prepared: Path, scope: str, micro: int, ranks: int, told: list[tuple[int, int]]
) -> None:
    """micro_sequences x data-parallel size, free to change at every start: with the published scope the loss depends on
    it. `record_start` prints and records what is found here."""
    checkpoint = Checkpoint.open(list_checkpoints(stopped_run / "checkpoints")[-1])
    keys = (f"model.feedforward.entropy_scope={scope}", f"batch.micro_sequences={micro}")
    changes = environment_changes(checkpoint, small_config(prepared, *keys), {"data": ranks})
    name = "sequences of a regulariser's batch, and so the loss (model.feedforward.entropy_scope = micro_batch)"
    assert [pair for key, pair in changes.items() if "regulariser" in key] == told
    assert (name in changes) is bool(told)


def test_another_manifest_is_refused(stopped_run: Path, prepared: Path) -> None:
    checkpoint = Checkpoint.open(list_checkpoints(stopped_run / "checkpoints")[-1])
    config = light_config(prepared, "train.steps=6", "evaluate.sequences=0")
    with pytest.raises(UserError, match=r"data\.manifest"):
        changed_settings(config, checkpoint, "0" * 64)


def test_resume_never_refuses_a_used_folder(stopped_run: Path, prepared: Path) -> None:
    config = light_config(prepared, "train.steps=6", "evaluate.sequences=0", "checkpoint.resume=never")
    with pytest.raises(RankFailed, match=r"checkpoint\.resume"):
        run_ranks(train_runs, 1, [(config, stopped_run)])


def test_state_that_leads_out_of_the_folder_is_refused(stopped_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    shutil.copytree(list_checkpoints(stopped_run / "checkpoints")[-1], folder)
    outside = {"../outside.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    rewrite_state(folder, lambda state: state["files"].update(outside))
    with pytest.raises(UserError, match="leaves the folder"):
        Checkpoint.open(folder)


def test_only_folders_with_the_exact_name_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000002.keep", "step-00000009-good", "step-00000003.partial", "step-100000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000020").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-100000000"]


def test_a_branch_whose_first_run_was_renamed_is_not_begun_anew(
    stopped_run: Path, prepared: Path, tmp_path: Path
) -> None:
    """Its own checkpoints would be set aside, for they name a place that is not there any more."""
    first, branch = Path(shutil.copytree(stopped_run, tmp_path / "first")), tmp_path / "branch"
    place = list_checkpoints(first / "checkpoints")[-1].relative_to(first)
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=1")
    begins = light_config(prepared, *keys, f"checkpoint.resume={first / place}", "train.stop_after_steps=4")
    run_ranks(train_runs, 1, [(begins, branch)])
    before = list_checkpoints(branch / "checkpoints")
    first.rename(tmp_path / "renamed")
    again = light_config(prepared, *keys, f"checkpoint.resume={tmp_path / 'renamed' / place}")
    with pytest.raises(RankFailed, match=r"not there any more; if it is .* set checkpoint\.resume to auto"):
        run_ranks(train_runs, 1, [(again, branch)])
    assert list_checkpoints(branch / "checkpoints") == before and [p.name[-1] for p in before] == ["3", "4"]
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), branch)])
    assert [row["step"] for row in metrics(branch)] == [3, 4, 5, 6]
    assert not list((branch / "checkpoints").glob("superseded*"))
