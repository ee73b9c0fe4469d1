"""launch/evaluate.py of a folder that launch/export.py, or transformers after it, wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pretrain.checkpoint import Checkpoint
from pretrain.cli.evaluate import main
from pretrain.cli.evaluate_checkpoint import Choices, evaluate_checkpoint
from pretrain.export.writing import ExportOptions, export
from pretrain.parallel.agreement import PeerFailed
from tests.harness import run_ranks
from tests.pretrain.evaluation import published


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, `mine`, and LAMBADA beside it."""
    folder = tmp_path_factory.mktemp("exported")
    published.lambada(folder)
    export(Checkpoint.open(checkpoint_of(trained)), folder / "mine", ExportOptions())
    return folder


def checkpoint_of(trained: Path) -> Path:
    return max((trained / "checkpoints").iterdir())


def test_an_export_gives_the_numbers_of_its_checkpoint(
    trained: Path, place: Path, prepared: Path, tmp_path: Path
) -> None:
    """Held-out split and tasks, with and without training.json, which a model that was tuned elsewhere has not."""
    tuned = Path(shutil.copytree(place / "mine", tmp_path / "tuned"))
    (tuned / "training.json").unlink()
    tasks, found = f"validation={prepared},lambada={place}", []
    for run in (checkpoint_of(trained), place / "mine", tuned):
        out = tmp_path / "out" / run.name
        assert main([str(run), "--tasks", tasks, "--limit", "4", "--context", "99", "--out", str(out)]) == 0
        results = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
        assert {Path(one["checkpoint"]).name for one in results} == {run.name}
        unlike = ("checkpoint", "step", "seconds", "time")
        found.append([{key: value for key, value in one.items() if key not in unlike} for one in results])
    assert found[0] == found[1] == found[2] and len(found[0]) == 2


def test_its_results_lie_beside_it_and_what_it_has_not_is_refused(
    place: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = str(place / "mine")
    assert main([mine, "--limit", "1"]) == 2, "its data are not where the run read them"
    assert "name the place of the prepared data with --data" in capsys.readouterr().err
    assert main([mine, "--limit", "1", "--data", str(prepared)]) == 0
    assert (place / "evaluation" / "mine" / "validation.json").is_file()
    assert main([mine, "--ema"]) == 2
    assert "mine is an export, which holds one set of weights" in capsys.readouterr().err


def _evaluated_together(rank: int, folder: Path) -> str:
    with pytest.raises((UserError, PeerFailed)) as failed:
        evaluate_checkpoint(folder, Choices(wanted={}), torch.device("cpu"))
    error = failed.value
    return error.words if isinstance(error, PeerFailed) else str(error)


def test_several_ranks_are_told_to_be_one(place: Path) -> None:
    for said in run_ranks(_evaluated_together, 2, place / "mine"):
        assert "mine is an export, which one process evaluates: leave the launcher out" in said
