"""The table of docs/models.md that says where the settings of switchall_1b come from: it has all of them, and what it
calls published is what the files of published models have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.json_config import read_tree
from pretrain.config.loading import load_config, to_json

ROOT = Path(__file__).resolve().parents[3]
OF_THE_RUN = {"train.seed", "train.device", "data.manifest", "model.attention.type", "model.feedforward.type"}
"""No choice that a source could be asked for."""


def rows() -> list[tuple[dict[str, Any], str]]:
    """Settings and source of each row."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("| setting | value | where it comes from |\n")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[1:]:
        keys, values, source = (cell.strip() for cell in line.strip("|").split(" | "))
        found.append((dict(zip(re.findall("`(.+?)`", keys), json.loads(f"[{values}]"), strict=True)), source))
    return found


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(path: str) -> dict[str, Any]:
    return dict(leaves(read_tree(ROOT / "configs" / path)))


def test_every_setting_of_the_model_and_its_training_has_its_source() -> None:
    sections = ("model", "batch", "optimizer", "schedule", "train", "parallel")
    expected = {key: value for key, value in settings("switchall_1b.json").items() if key.partition(".")[0] in sections}
    told = [(key, value) for row, _ in rows() for key, value in row.items()]
    assert len(told) == len(dict(told)), "each once"
    assert dict(told) == {key: value for key, value in expected.items() if key not in OF_THE_RUN}


def test_what_is_called_published_is_what_the_published_models_have() -> None:
    published, named = settings("paper/c4_switchall_259m.json"), 0
    for row, source in rows():
        if file := re.search(r"\.\./configs/(paper/\w+\.json)", source):
            found = settings(file[1])
        elif source.startswith("the same file"):
            found = published
        else:
            continue
        named += 1
        assert {key: found[key] for key in row} == row
    assert named == 3


def test_what_is_called_twice_the_published_is() -> None:
    ours, published = settings("switchall_1b.json"), settings("paper/c4_switchall_259m.json")
    twice = [key for row, source in rows() if "twice" in source for key in row]
    assert len(twice) == 4 and all(ours[key] == 2 * published[key] for key in twice)


def test_the_published_values_beside_chosen_ones_are_those() -> None:
    published, looked_at = settings("paper/c4_switchall_259m.json"), 0
    for row, source in rows():
        if values := re.search(r"\(published: ([^()]*)\)$", source):
            words = values[1].partition(", and 0.1 of experts")[0]
            assert json.loads(f"[{words}]") == [published[key] for key in row]
            looked_at += 1
    assert looked_at == 5


def test_defaults_that_are_not_the_published_values_are_named() -> None:
    """Keys that the file of the run does not have."""
    ours, published = (
        dict(leaves(to_json(load_config(ROOT / "configs" / name))))
        for name in ("switchall_1b.json", "paper/c4_switchall_259m.json")
    )
    told = {key for row, _ in rows() for key in row} | OF_THE_RUN
    told |= {"model.attention.expert_dropout", "model.feedforward.expert_dropout", "model.position.memory_chunks"}
    defaults = {key for key in ours.keys() & published.keys() - told if ours[key] != published[key]}
    defaults = {
        key for key in defaults if key.partition(".")[0] in ("model", "batch", "optimizer", "schedule", "train")
    }
    assert defaults == {"model.initialization", "schedule.shape"}
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    paragraph = page.partition("\nInitial weights (")[2].partition("\n\n")[0]
    assert all(f"`{ours[key]}`" in f"({paragraph}" for key in defaults)
