"""The stages together: what is left out, what is recorded, and that kills, workers and array tasks change no byte."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.config.loading import load_config
from data_prep.config.resolved import resolve
from data_prep.run import output_files
from data_prep.shards.format import Manifest, manifest_digest
from data_prep.shards.reader import ShardReader
from tests.data_prep.kills import Killed, run_with_kills
from tests.data_prep.outcome import decoded, one_error, outputs
from tests.data_prep.raw_corpus import GERMAN, near_copy, sample_texts, write_config, write_corpus

# Parts of 60 KB and every file alone, as large ones are: it becomes several, so that stages have something to
# interrupt. Small files together have a test in test_small_files.py.
DRIVER = """
import sys
from data_prep.__main__ import main  # as a user starts it: workers are forked
import data_prep.stages.ingest
data_prep.stages.ingest.PART_BYTES = 60_000
data_prep.stages.ingest.BATCH_BYTES = 0
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stages")
    return folder, write_corpus(folder / "raw")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 60_000)
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 0)


@pytest.fixture(scope="module")
def clean(raw: tuple[Path, dict[str, Any]]) -> Path:
    """The output of one run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.stages.ingest.PART_BYTES", 60_000)
        patch.setattr("data_prep.stages.ingest.BATCH_BYTES", 0)
        assert main(["run", "--config", str(write_config(raw, "clean"))]) == 0
    return raw[0] / "clean"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_left_is_what_should_be(clean: Path) -> None:
    manifest = Manifest.load(clean)
    manifest.check("full")
    texts = sample_texts(60)
    train = decoded(manifest, "train")
    left_out = [GERMAN * 20, "short.", near_copy(texts[4]), near_copy(texts[20])]
    assert not set(left_out) & set(train)
    assert train.count(texts[3]) == 1
    assert train.index(texts[3]) < 30  # the first of two stays
    assert texts[7] in train
    assert texts[7] not in decoded(manifest, "validation")  # what training has seen is no validation
    assert len(set(train)) == len(train)


def test_the_manifest_counts_every_document_once(clean: Path) -> None:
    manifest = Manifest.load(clean)
    inputs = {record.name: record for record in manifest.provenance.inputs}
    assert list(inputs) == [
        "c4-train.00000.json.gz", "c4-train.00001.json.gz", "c4-train.00002.json.gz", "pes2o-train.json.gz",
        "own.jsonl", "c4-validation.json.gz",
    ]  # fmt: skip
    first = inputs["c4-train.00000.json.gz"]
    assert first.quarantined == {"empty": 1, "no text": 1, "not JSON": 1, "not UTF-8": 1}
    assert first.documents + first.filtered + first.duplicates == 30
    assert inputs["c4-train.00002.json.gz"].quarantined == {"damaged file": 1}
    assert inputs["c4-train.00002.json.gz"].documents == 0
    assert inputs["own.jsonl"].format == "jsonl"
    dropped: Any = manifest.provenance.dropped
    assert dropped["quarantined"] == {"damaged file": 1, "empty": 1, "no text": 1, "not JSON": 1, "not UTF-8": 1}
    assert (dropped["duplicates"]["exact"], dropped["duplicates"]["near"]) == (2, 2)
    assert dropped["filtered"]["language"] == 1
    assert sum(dropped["filtered"].values()) == sum(record.filtered for record in inputs.values())
    assert sum(totals.documents for totals in manifest.totals.values()) == sum(r.documents for r in inputs.values())


def test_records_say_what_and_why(clean: Path, raw: tuple[Path, dict[str, Any]]) -> None:
    quarantine = read_lines(clean / "quarantine.jsonl")
    assert [(line["file"], line["line"], line["reason"]) for line in quarantine[:4]] == [
        ("c4-train.00000.json.gz", 6, "not JSON"),
        ("c4-train.00000.json.gz", 7, "empty"),
        ("c4-train.00000.json.gz", 8, "not UTF-8"),
        ("c4-train.00000.json.gz", 9, "no text"),
    ]
    assert quarantine[0]["excerpt"] == "{not json"
    assert (quarantine[4]["file"], quarantine[4]["reason"]) == ("c4-train.00002.json.gz", "damaged file")
    samples = read_lines(clean / "filter_samples.jsonl")
    assert {"file", "position", "rule", "detail", "excerpt", "bytes"} == samples[0].keys()
    assert max(Counter(line["rule"] for line in samples).values()) <= 2
    (german,) = [line for line in samples if line["rule"] == "language"]
    assert (german["detail"], german["position"]) == ("de, not en", 31)
    duplicates = read_lines(clean / "duplicate_samples.jsonl")
    near = [line for line in duplicates if line["kind"] == "near"]
    assert len(duplicates) == 4 and all(line["similarity"] > 0.9 for line in near)
    assert {(line["kept_file"], line["kept_position"]) for line in near} == {
        ("c4-train.00000.json.gz", 5), ("c4-train.00000.json.gz", 25),
    }  # fmt: skip
    for path in clean.iterdir():
        if path.suffix in (".json", ".jsonl") and path.name != "run.json":
            assert str(raw[0]) not in path.read_text()


def test_two_workers_other_parts_and_single_steps_give_the_same_bytes(
    raw: tuple[Path, dict[str, Any]], clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "--config", str(write_config(raw, "two", workers=2))]) == 0
    assert outputs(raw[0] / "two") == outputs(clean)
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 1 << 25)
    monkeypatch.setattr("data_prep.stages.part_cutter.PART_DOCUMENTS", 7)
    monkeypatch.setattr("data_prep.stages.signatures.BATCH_DOCUMENTS", 3)
    steps = write_config(raw, "steps")
    for command in ("ingest", "filter", "dedup", "tokenizer", "encode", "shard"):
        assert main([command, "--config", str(steps)]) == 0
        if command == "dedup":  # short documents: their number bounds what is in memory
            parts = [
                part
                for path in (raw[0] / "steps" / ".work").glob("ingest-*/*.json")
                for part in json.loads(path.read_text())["parts"]
            ]
            assert max(part["documents"] for part in parts) == 7
    assert outputs(raw[0] / "steps") == outputs(clean)


def test_array_tasks_and_one_merge_give_the_same_bytes(
    raw: tuple[Path, dict[str, Any]], clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(raw, "array"))

    def array(command: str, tasks: range) -> list[int]:
        return [main([command, "--config", config, "--task", str(task), "--tasks", "4"]) for task in tasks]

    assert array("dedup", range(1, 4)) == [0, 0, 0]
    assert main(["encode", "--config", config, "--task", "0", "--tasks", "4"]) == 2
    assert "no tokenizer in" in one_error(capsys)
    assert array("dedup", range(1)) == [0]
    assert main(["tokenizer", "--config", config]) == 0
    assert array("encode", range(4)) == [0, 0, 0, 0]
    assert main(["shard", "--config", config]) == 0
    assert outputs(raw[0] / "array") == outputs(clean)
    assert array("encode", range(1)) == [0]
    assert "up to date" in capsys.readouterr().out
    for arguments, message in (
        (["--task", "4", "--tasks", "4"], "not below --tasks"),
        (["--task", "1"], "go together"),
    ):
        assert main(["ingest", "--config", config, *arguments]) == 2
        assert message in one_error(capsys)


def test_stopped_after_every_few_files_and_continued(raw: tuple[Path, dict[str, Any]], clean: Path) -> None:
    """No finished part is made twice."""
    finished = run_with_kills(["run", "--config", str(write_config(raw, "stopped"))], files=15, kills=6)
    assert outputs(raw[0] / "stopped") == outputs(clean)
    stages = [file for file in finished if file.parent.name.startswith(("ingest-", "filter-", "encode-"))]
    assert max(Counter(file for file in stages if file.suffix == ".json").values()) == 1


@pytest.mark.slow  # test_stopped_after_every_few_files_and_continued is killed elsewhere
def test_a_half_removed_work_folder_is_not_taken_for_finished_stages(
    raw: tuple[Path, dict[str, Any]], clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it cleaned up; then the data must be made again."""
    config = str(write_config(raw, "half"))
    out = raw[0] / "half"

    def remove_a_part(folder: Path, **_: Any) -> None:
        if folder.exists():
            next(iter(sorted(folder.glob("ingest-*/*.zst")))).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(output_files.shutil, "rmtree", remove_a_part)
        with pytest.raises(Killed):
            main(["run", "--config", config])
    assert main(["run", "--config", config]) == 0  # up to date, and cleans up
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == [".lock"]
    with monkeypatch.context() as patch:
        patch.setattr(output_files.shutil, "rmtree", remove_a_part)
        with pytest.raises(Killed):
            main(["run", "--config", config, "--force"])
    (out / "manifest.json").unlink()
    assert main(["run", "--config", config]) == 0
    assert outputs(out) == outputs(clean)


def run_and_kill(config: Path, after: float, workers: int) -> int:
    """Starts a run and kills its process (not its workers) after some seconds; the exit code."""
    command = [sys.executable, "-c", DRIVER, "run", "--config", str(config), "--set", f"workers={workers}"]
    with config.with_suffix(".err").open("wb") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=errors, stdout=subprocess.DEVNULL)
    try:
        return process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_killed_ten_times_at_random_gives_the_same_bytes(
    raw: tuple[Path, dict[str, Any]], clean: Path, workers: int
) -> None:
    rng = random.Random(workers)
    name = f"killed-{workers}"
    config = write_config(raw, name)
    started = time.monotonic()
    assert run_and_kill(write_config(raw, f"timed-{workers}"), 600, workers) == 0
    whole = time.monotonic() - started
    kills = 0
    while kills < 10:
        # From start-up to the full length of a run: later kills find most of the work done and fall into its end.
        code = run_and_kill(config, rng.uniform(0.1, 1.0) * whole, workers)
        if code == -signal.SIGKILL:
            kills += 1
        else:
            assert code == 0, config.with_suffix(".err").read_text()
            (raw[0] / name / "manifest.json").unlink()  # done too soon: begin again from what is there
    assert run_and_kill(config, 600, workers) == 0
    assert outputs(raw[0] / name) == outputs(clean)
    assert not list((raw[0] / name).glob(".*.tmp")) and not (raw[0] / name / ".work").exists()


def test_thresholds_stop_a_run_and_a_mended_file_continues_it(
    raw: tuple[Path, dict[str, Any]], clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = write_config(raw, "strict", ingest={"max_bad_records": 0.001})
    assert main(["run", "--config", str(strict)]) == 2
    error = one_error(capsys)
    assert "3 of 102 records are malformed" in error
    assert "the first: c4-train.00000.json.gz:6: not JSON" in error
    pattern = error.rpartition("all are in ")[2]
    lines = [line for path in sorted(Path("/").glob(pattern.lstrip("/"))) for line in read_lines(path)]
    assert {"not JSON", "not UTF-8", "no text"} <= {line["reason"] for line in lines}
    assert main(["run", "--config", str(strict), "--set", "ingest.max_bad_records=0.5"]) == 0
    assert outputs(raw[0] / "strict") == outputs(clean)
    only = write_config(raw, "only", input=[f"{raw[0]}/raw/c4-train.00002.json.gz"])
    assert main(["run", "--config", str(only)]) == 2
    error = one_error(capsys)
    assert "no document for the train split" in error
    assert "quarantined: damaged file" in error
    assert main(["run", "--config", str(only), "--set", "validation_input=[]"]) == 2
    error = one_error(capsys)
    assert "1 of 1 raw files are bad" in error
    assert "c4-train.00002.json.gz is damaged" in error


def test_urls_are_read_like_files(raw: tuple[Path, dict[str, Any]], clean: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in sorted((raw[0] / "raw").iterdir()):
        memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    moved = {
        "input": ["memory://corpus/c4-train.*.json.gz", "memory://corpus/pes2o-*.json.gz", "memory://corpus/own.jsonl"],
        "validation_input": "memory://corpus/c4-validation.json.gz",
    }
    config = write_config(raw, "remote", **moved)
    assert main(["run", "--config", str(config)]) == 0
    assert outputs(raw[0] / "remote") == outputs(clean)
    assert main(["run", "--config", str(config)]) == 0
    with pytest.raises(DataError, match="matches no file"):
        resolve(load_config(config, ["input=memory://corpus/none*"]))


def test_the_report_shows_what_is_there_and_what_was_left_out(
    raw: tuple[Path, dict[str, Any]], clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = raw[0] / "report"
    assert main(["stats", str(clean), "--out", str(out)]) == 0
    assert "duplicates" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    plots = {path.name for path in out.glob("*.png")}
    assert plots == {"lengths.png", "bytes_per_token.png", "left_out.png", "duplicates.png", "vocabulary.png"}
    assert all(f"({name})" in text for name in plots)
    assert all((out / name).stat().st_size > 3000 for name in plots)
    for expected in ("| quarantined: not JSON | 1 |", "| duplicates: near | 2 |", "| c4-train.00000.json.gz | c4 |"):
        assert expected in text
    assert len(Manifest.load(clean).provenance.inputs) == text.count(" | train | ") + text.count(" | validation | ")


def test_verify_reads_the_raw_files_too_and_every_token(
    raw: tuple[Path, dict[str, Any]], clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(raw, "clean")
    assert main(["verify", "--config", str(config)]) == 0
    assert "6 files" in capsys.readouterr().out
    path = raw[0] / "raw" / "own.jsonl"
    whole, stamp = path.read_bytes(), path.stat()
    path.write_bytes(whole.replace(b"the", b"teh", 1))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a disk that loses bits leaves it
    try:
        assert main(["verify", "--config", str(config)]) == 2
        assert "own.jsonl has changed" in one_error(capsys)
    finally:
        path.write_bytes(whole)
    # A shard that agrees with its manifest, but not with what shards are: one EOS changed places with the id before.
    forged = Path(shutil.copytree(clean, raw[0] / "forged"))
    entry = Manifest.load(forged).split("train")[0]
    reader = ShardReader(Manifest.load(forged), entry, False)
    end = int(reader.document_starts[1]) - 1
    reader.close()
    assert end < 4096  # in the first member, whose data begin at byte 512
    data = bytearray((forged / entry.file).read_bytes())
    last, eos = (data[512 + 2 * place : 514 + 2 * place] for place in (end - 1, end))
    data[510 + 2 * end : 514 + 2 * end] = eos + last
    (forged / entry.file).write_bytes(data)
    body = json.loads((forged / "manifest.json").read_text())
    body["splits"]["train"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    body["digest"] = manifest_digest(body)
    (forged / "manifest.json").write_text(json.dumps(body))
    assert main(["verify", str(forged)]) == 2
    said = f"{entry.file}: documents do not end where its index says, first at token {end - 1:,}; prepare"
    assert said in one_error(capsys)
