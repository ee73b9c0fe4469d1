"""Nodes may have copies of a task's files, each at a place of its own; what they hold must be the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from common.errors import UserError
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import events, light_config


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
        assert run_ranks(_trained, 2, prepared, tmp_path / "run", places, timeout_seconds=60) == ["trained"] * 2
    assert len(events(tmp_path / "run", "evaluation")) == 1
