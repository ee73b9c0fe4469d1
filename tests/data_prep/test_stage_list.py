"""The list of stages: what commands, docs and array tasks make of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.run.pipeline import _divided
from data_prep.run.stages import STAGES
from tests.data_prep.conftest import Corpus

NAMES = [stage.name for stage in STAGES]


def test_the_documented_steps_are_the_stages_in_their_order() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("| step | unit |")[2].partition("\n\n")[0]
    steps = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert steps == [name for name in NAMES if name != "sign"], "sign is the first half of the step dedup"


@pytest.mark.parametrize(
    "until, before, due",
    [
        ("ingest", "", "ingest"),
        ("filter", "", "ingest filter"),
        ("dedup", "", "ingest filter sign"),  # the removal of duplicates itself needs what all tasks have left
        ("encode", "ingest filter sign dedup tokenizer", "encode"),
    ],
)
def test_an_array_task_does_the_last_stages_over_slices(until: str, before: str, due: str) -> None:
    stages = STAGES[: 1 + NAMES.index(until)]
    found = _divided(stages, is_all=False)
    assert [" ".join(stage.name for stage in part) for part in found] == [before, due]
    assert _divided(stages, is_all=True) == ([], stages)


def test_what_is_published_comes_of_stages_over_everything() -> None:
    assert [stage.name for stage in STAGES if stage.publishes is not None] == ["tokenizer", "shard"]
    assert all(stage.over == "all" for stage in STAGES if stage.publishes is not None)


def test_an_array_task_refuses_what_the_stages_before_have_not_finished(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out")))
    assert main(["tokenizer", "--config", config]) == 0
    (folder,) = (tmp_path / "out" / ".work").glob("ingest-*")
    (state,) = sorted(folder.glob("*.json"))[:1]
    kept = state.read_bytes()
    state.unlink()
    capsys.readouterr()
    codes = [main(["encode", "--config", config, "--task", task, "--tasks", "2"]) for task in ("0", "1")]
    assert sorted(codes) == [0, 2], "the task whose batch is not ingested is refused, and does not ingest it"
    assert re.search(r"^error: ingest.* is not finished; run the stages before", capsys.readouterr().err, re.MULTILINE)
    assert not state.exists()
    state.write_bytes(kept)
    for task in ("0", "1"):
        assert main(["encode", "--config", config, "--task", task, "--tasks", "2"]) == 0
    assert main(["shard", "--config", config]) == 0
