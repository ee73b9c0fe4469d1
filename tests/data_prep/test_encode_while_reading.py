"""With a tokenizer that is there already, raw files become ids as they are read: the same bytes, no text on disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.shards.format import Manifest
from data_prep.work import folder as work
from data_prep.work.parallel import _start_method
from tests.data_prep.kills import run_with_kills
from tests.data_prep.outcome import outputs
from tests.data_prep.raw_corpus import write_config, write_corpus


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A corpus (one file of it is damaged) and a model trained on it; no filters."""
    folder = tmp_path_factory.mktemp("encode")
    body = write_corpus(folder / "raw")
    body = {key: value for key, value in body.items() if key not in ("filter", "dedup")}
    trained = folder / "trained.json"
    trained.write_text(json.dumps({**body, "output": str(folder / "trained")}))
    assert main(["run", "--config", str(trained)]) == 0
    return folder, {**body, "tokenizer": {"model": str(folder / "trained" / "tokenizer.model")}}


@pytest.fixture(scope="module")
def apart(raw: tuple[Path, dict[str, Any]]) -> dict[str, str]:
    """What the separate steps make: `keep_work` stores the text."""
    assert main(["run", "--config", str(write_config(raw, "apart", keep_work=True))]) == 0
    assert list((raw[0] / "apart" / ".work").glob("ingest-*/*.zst"))
    return outputs(raw[0] / "apart")


def test_the_same_bytes_and_no_text_on_disk(
    raw: tuple[Path, dict[str, Any]], apart: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = work.os.replace

    def noted(source: Path, target: Path) -> None:
        made.append(target.name)
        real(source, target)

    monkeypatch.setattr(work.os, "replace", noted)
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 20_000)
    assert main(["run", "--config", str(write_config(raw, "at-once"))]) == 0
    assert outputs(raw[0] / "at-once") == apart
    assert len([name for name in made if name.endswith(".tok")]) > 10 and not [n for n in made if n.endswith(".zst")]
    assert Manifest.load(raw[0] / "at-once").provenance.dropped["quarantined"] == {
        "damaged file": 1, "empty": 1, "no text": 1, "not JSON": 1, "not UTF-8": 1,
    }  # fmt: skip


def test_damaged_ids_are_made_again_when_what_the_message_names_is_removed(
    raw: tuple[Path, dict[str, Any]], apart: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(raw, "damaged"))
    assert main(["ingest", "--config", config]) == 0
    ids = min((raw[0] / "damaged" / ".work").glob("encode-*/*.tok"))
    ids.write_bytes(b"\xff" + ids.read_bytes()[1:])
    assert main(["run", "--config", config]) == 2
    said = capsys.readouterr().err
    assert f"{ids} was damaged after it was written; remove " in said
    shutil.rmtree(said.rpartition("; remove ")[2].strip())
    assert main(["run", "--config", config]) == 0
    assert outputs(raw[0] / "damaged") == apart


def test_validation_by_hash_goes_the_same_way(raw: tuple[Path, dict[str, Any]]) -> None:
    changes = {"validation_input": [], "validation_fraction": 0.3}
    assert main(["run", "--config", str(write_config(raw, "hash", **changes))]) == 0
    assert main(["run", "--config", str(write_config(raw, "hash-apart", keep_work=True, **changes))]) == 0
    assert outputs(raw[0] / "hash") == outputs(raw[0] / "hash-apart")
    assert Manifest.load(raw[0] / "hash").totals["validation"].documents > 10


def test_killed_again_and_again(
    raw: tuple[Path, dict[str, Any]], apart: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 60_000)
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 0)  # a batch must not need more than 14
    run_with_kills(["run", "--config", str(write_config(raw, "killed"))], files=14, kills=2)
    assert outputs(raw[0] / "killed") == apart


def test_steps_and_array_tasks(raw: tuple[Path, dict[str, Any]], apart: dict[str, str]) -> None:
    config = str(write_config(raw, "steps"))
    for task in ("0", "1"):
        assert main(["dedup", "--config", config, "--task", task, "--tasks", "2"]) == 0
    assert main(["tokenizer", "--config", config]) == 0
    for task in ("0", "1"):
        assert main(["encode", "--config", config, "--task", task, "--tasks", "2"]) == 0
    assert main(["shard", "--config", config]) == 0
    assert outputs(raw[0] / "steps") == apart


def test_another_number_of_workers_goes_on_where_the_first_was(
    raw: tuple[Path, dict[str, Any]], apart: dict[str, str]
) -> None:
    """The first step decides, for fewer raw files than its workers and for more, and the others follow."""
    for name, first, second in (("many", "7", "1"), ("few", "1", "7")):
        config = str(write_config(raw, name))
        assert main(["ingest", "--config", config, "--task", "0", "--tasks", "1", "--set", f"workers={first}"]) == 0
        stored = list((raw[0] / name / ".work").glob("ingest-*/*.zst"))
        assert bool(stored) == (name == "many")
        before = {path: path.stat().st_mtime_ns for path in (raw[0] / name / ".work").glob("ingest-*/*")}
        assert main(["ingest", "--config", config, "--set", f"workers={second}"]) == 0
        assert {path: path.stat().st_mtime_ns for path in (raw[0] / name / ".work").glob("ingest-*/*")} == before
        assert main(["run", "--config", config, "--set", "workers=1"]) == 0
        assert outputs(raw[0] / name) == apart


def test_the_command_forks_its_workers(raw: tuple[Path, dict[str, Any]], apart: dict[str, str]) -> None:
    """As a user starts it; here, among pytest's threads, workers may be spawned."""
    config = str(write_config(raw, "forked", workers=2))
    code = (
        "import sys\nfrom data_prep import __main__\nfrom data_prep.work import parallel\n"
        "from data_prep.stages import pack\n"
        "assert parallel._start_method() == 'fork'\n"
        "pack.FEW_TOKENS = 0\n"  # shards too by several processes, with webdataset imported before they are forked
        "code = __main__.main(sys.argv[1:])\n"
        "assert 'webdataset' in sys.modules and parallel._start_method() == 'fork'\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, "run", "--config", config], check=True, env=environment, cwd=raw[0])
    assert outputs(raw[0] / "forked") == apart
    assert _start_method() in ("fork", "spawn")


def test_the_first_choice_holds_for_all_also_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none."""

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert [work.decided(tmp_path / "choice", choice) for choice in (False, True, False)] == [False] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["choice"]
    with ThreadPoolExecutor(8) as together:
        for place in (tmp_path / str(number) for number in range(20)):
            assert len(set(together.map(lambda choice, to=place: work.decided(to, choice), [True, False] * 4))) == 1


def test_a_disk_that_is_full_leaves_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        work.decided(tmp_path / "choice", True)
    assert not list(tmp_path.iterdir())
