"""Nodes may have copies of data and of task files, each at a place of its own; what they hold must be the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

from common.errors import UserError
from data_prep.shards.format import manifest_digest
from pretrain.cli.evaluate_checkpoint import Choices, evaluate_checkpoint
from pretrain.data.sources import Sources
from pretrain.data.stages import Stage
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from pretrain.resume import find_start
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import events, light_config, train_runs


def _trained(rank: int, prepared: Path, run: Path, places: list[Path]) -> str:
    """What a start says that reads the tasks of this rank's place."""
    tasks = {"lambada": str(places[rank])}
    keys = ("train.steps=1", "evaluate.sequences=0", "evaluate.tasks_limit=3", f"evaluate.tasks={json.dumps(tasks)}")
    config = light_config(prepared, *keys, ranks=2)
    try:
        train(config, Sources.load(config), run, torch.device("cpu"))
    except (UserError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_each_node_has_its_own_place(prepared: Path, tmp_path: Path) -> None:
    """Also on a resume, where rank 0 alone has the place that the checkpoint names."""
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    published.lambada(places[0])
    for place in places[1:]:
        shutil.copytree(places[0], place, dirs_exist_ok=True)
    for _ in range(2):
        assert run_ranks(_trained, 2, prepared, tmp_path / "run", places) == ["trained"] * 2
    assert len(events(tmp_path / "run", "evaluation")) == 1


def other_data(prepared: Path, copy: Path) -> None:
    """The same shards as another data set."""
    shutil.copytree(prepared, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["provenance"]["config"]["seed"] = "another"
    manifest["digest"] = manifest_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))


def _stages(rank: int, data: list[Path], run: Path) -> tuple[Stage, ...]:
    """What this rank reads from its own place, where the data of `run` have changed."""
    config = light_config(data[rank], 'checkpoint.allow_changes=["data.manifest"]', "evaluate.sequences=0", ranks=2)
    return find_start(config, Sources.load(config), run, None).progress.stages


def test_other_data_go_on_by_the_name_that_the_first_node_gives_them(prepared: Path, tmp_path: Path) -> None:
    places = [tmp_path / "a" / prepared.name, tmp_path / "b" / "another name"]
    for place in places:
        other_data(prepared, place)
    config = light_config(prepared, "train.steps=30", "train.stop_after_steps=1", "evaluate.sequences=0")
    run_ranks(train_runs, 1, [(config, tmp_path / "run")])
    first, second = run_ranks(_stages, 2, places, tmp_path / "run")
    assert first == second and [source.read for source in first[-1].mixed] == [8]


def _outcomes(rank: int, prepared: Path, run: Path, places: list[Path]) -> list[str]:
    """What two ranks with other files are told: by a run, and by an evaluation of `run` of tasks and of data."""
    said = [_trained(rank, prepared, run.parent / "other", places)]
    data = [prepared, places[1] / "data"]
    for task, place in (("lambada", places[rank]), ("validation", data[rank])):
        choices = Choices(wanted={task: str(place)}, overrides=("evaluate.sequences=4",))
        try:
            evaluate_checkpoint(run, choices, torch.device("cpu"))
            said.append("evaluated")
        except (UserError, PeerFailed) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_files_that_differ_are_refused(prepared: Path, tmp_path: Path) -> None:
    """Ranks of other numbers of batches would wait for ever."""
    places = [tmp_path / name for name in "ab"]
    for count, place in enumerate(places, 2):
        place.mkdir()
        published.lambada(place, count)
    other_data(prepared, places[1] / "data")
    assert run_ranks(_trained, 2, prepared, tmp_path / "run", [places[0]] * 2) == ["trained"] * 2
    first, second = run_ranks(_outcomes, 2, prepared, tmp_path / "run", places)
    assert second == ["PeerFailed: "] * 3
    expected = [
        "evaluate.tasks: rank 0 has lambada of digest X, rank 1 has lambada of digest X",
        "lambada: rank 0 has files of digest X, rank 1 has files of digest X",
        "validation: data.manifest (digest): rank 0 has X, rank 1 has X",
    ]
    words = [re.sub("[0-9a-f]{12,}", "X", said) for said in first]
    assert words == [f"UserError: {said}; give all nodes the same" for said in expected]
