"""Thousands of small files: read together, with the same bytes as one by one, whatever stops the run."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.shards.format import Manifest
from data_prep.stages.ingest import BATCH_FILES, cut_batches
from tests.data_prep.kills import run_with_kills
from tests.data_prep.outcome import outputs
from tests.data_prep.raw_corpus import sample_texts, write_config

FILES = 80
ON_TWO = """
import sys, pytest
from data_prep.cli import main
from tests.data_prep.test_small_files import limit
with pytest.MonkeyPatch.context() as patch:
    limit(patch)
    sys.exit(main(["run", "--config", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Files of one document or two, some of them bad, some duplicates of others, one larger than what waits in
    memory."""
    folder = tmp_path_factory.mktemp("small")
    texts = [text[:900] for text in sample_texts(FILES)]
    for number, text in enumerate(texts):
        lines = [json.dumps({"text": text})] + ([json.dumps({"text": texts[number - 3]})] if number % 10 == 4 else [])
        lines += ["not json"] if number % 20 == 1 else []
        (folder / f"{number:03d}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "050.jsonl").write_text("<html>no</html>\n")
    large = [json.dumps({"text": text[:900]}) for text in sample_texts(40, skip=FILES)]
    (folder / "060.jsonl").write_text("\n".join(large))
    # Cut after more than waits in memory: what it gave is taken back.
    frames = b"".join(zstandard.compress(line.encode() + b"\n") for line in large)
    (folder / "061.jsonl.zst").write_bytes(frames[:-9])
    return folder, {
        "input": f"{folder}/*.jsonl*",
        "workers": 1,
        "filter": {"c4": False, "gopher_quality": False, "gopher_repetition": False, "min_words": 20},
        "dedup": {},
        "tokenizer": {"vocab_size": 500},
        "shard": {"tokens_per_shard": 20000, "tokens_per_member": 2048},
    }


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch)


def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of some files, parts smaller than a batch, a file that gets parts of its own."""
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 16_000)
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 7000)
    monkeypatch.setattr("data_prep.stages.part_cutter.PENDING_BYTES", 20_000)
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", 8000)


def test_batches_depend_on_sizes_and_order_alone() -> None:
    small, large, unknown = ("hash", 100), ("hash", 1 << 20), ("hash", None)
    assert cut_batches([]) == []
    assert cut_batches([small, small, large, small, unknown, small, ("validation", 1)]) == [  # type: ignore[list-item]
        range(0, 1 + 1), range(2, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7),
    ]  # fmt: skip
    assert [len(batch) for batch in cut_batches([("hash", 0)] * (BATCH_FILES + 1))] == [BATCH_FILES, 1]


@pytest.mark.parametrize("on_two", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_files_together_alone_and_on_two_processes_give_the_same_bytes(
    raw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, on_two: bool
) -> None:
    """test_stages.py has a fast one on two processes."""
    assert main(["run", "--config", str(write_config(raw, "together", keep_work=True))]) == 0
    together = outputs(raw[0] / "together")
    if on_two:
        # In a process of one thread, which forks: workers that are spawned have no limits.
        line = [sys.executable, "-c", ON_TWO, str(write_config(raw, "two", workers=2))]
        subprocess.run(line, cwd=REPOSITORY, check=True)
        assert outputs(raw[0] / "two") == together
    (ingest,) = (raw[0] / "together" / ".work").glob("ingest-*")
    batches = [json.loads(path.read_bytes()) for path in ingest.glob("*.json")]
    assert 5 < len(batches) < 20 and max(len(batch["files"]) for batch in batches) > 10
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 0)
    assert main(["run", "--config", str(write_config(raw, "alone"))]) == 0
    assert outputs(raw[0] / "alone") == together
    records = {record.name: record for record in Manifest.load(raw[0] / "together").provenance.inputs}
    assert len(records) == FILES + 1
    assert sum(record.documents for record in records.values()) == sum(
        totals.documents for totals in Manifest.load(raw[0] / "together").totals.values()
    )
    assert (records["050.jsonl"].quarantined, records["050.jsonl"].documents) == ({"no document": 1}, 0)
    assert (records["061.jsonl.zst"].quarantined, records["061.jsonl.zst"].documents) == ({"damaged file": 1}, 0)
    assert records["060.jsonl"].documents > 20
    parts = {part["name"] for batch in batches for part in batch["parts"]}
    assert {path.stem for path in ingest.glob("*.zst")} > parts, "061 had parts of its own when its damage was found"
    assert records["004.jsonl"].duplicates == 1 and records["021.jsonl"].quarantined == {"not JSON": 1}
    quarantine = [json.loads(line) for line in (raw[0] / "together" / "quarantine.jsonl").read_bytes().splitlines()]
    assert [line["file"] for line in quarantine if line["reason"] == "not JSON"] == [
        f"{number:03d}.jsonl" for number in range(1, FILES, 20)
    ]


def test_stopped_after_every_few_files_and_continued(raw: tuple[Path, dict[str, Any]]) -> None:
    assert main(["run", "--config", str(write_config(raw, "whole"))]) == 0
    finished = run_with_kills(["run", "--config", str(write_config(raw, "stopped"))], files=40, kills=3)
    assert outputs(raw[0] / "stopped") == outputs(raw[0] / "whole")
    assert max(Counter(file.name for file in finished if file.name.endswith(".quarantine.jsonl")).values()) == 1


def test_a_file_is_taken_back_from_the_parts_that_it_shares(raw: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Damage behind the first documents: none of them stays, and none of the files beside it goes."""
    body = {**raw[1], "filter": None, "dedup": None, "output": str(tmp_path / "out"), "input": f"{tmp_path}/*.jsonl*"}
    lines = [json.dumps({"text": f"{name} {number} " + "word " * 20}) for name in "abc" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:40]))
    packed = gzip.compress("\n".join(lines[40:80]).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-4])
    (tmp_path / "c.jsonl").write_text("\n".join(lines[80:]))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**body, "tokenizer": {"vocab_size": 280}, "ingest": {"max_bad_files": 0.5}}))
    assert main(["run", "--config", str(config)]) == 0
    inputs = Manifest.load(tmp_path / "out").provenance.inputs
    assert [(record.name, record.documents) for record in inputs] == [
        ("a.jsonl", 40),
        ("b.jsonl.gz", 0),
        ("c.jsonl", 40),
    ]
