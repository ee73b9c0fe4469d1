"""The whole preparation: what comes back, that it is reproducible, and that it never leaves a false
manifest."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.config import versions
from data_prep.run import output_files, stages
from data_prep.shards.format import Manifest
from tests.data_prep.conftest import Corpus, c4_line, write_dump
from tests.data_prep.outcome import decoded, one_error, outputs, run


def test_every_document_comes_back_in_order(corpus: Corpus, manifest: Manifest) -> None:
    assert decoded(manifest, "train") == corpus.train
    assert decoded(manifest, "validation") == corpus.validation


def test_manifest_totals_and_provenance(corpus: Corpus, manifest: Manifest) -> None:
    for split, texts in [("train", corpus.train), ("validation", corpus.validation)]:
        totals = manifest.model_dump()["totals"][split]
        assert totals["documents"] == len(texts)
        assert totals["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert totals["tokens"] == manifest.num_tokens(split)
    inputs = manifest.provenance.inputs
    assert [(record.name, record.format, record.split, record.documents) for record in inputs] == [
        ("c4-train.00000-of-00002.json.gz", "c4", "train", 62),
        ("c4-train.00001-of-00002.json.gz", "c4", "train", 62),
        ("train-00000.json.gz", "pes2o", "train", 62),
        ("c4-validation.00000.json.gz", "c4", "validation", 62),
        ("valid-00000.json.gz", "pes2o", "validation", 62),
    ]
    stored = (corpus.folder / "c4" / inputs[0].name).read_bytes()
    assert (inputs[0].bytes, inputs[0].sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
    assert manifest.provenance.versions.keys() == {
        "data_prep",
        "python",
        "numpy",
        "safetensors",
        "sentencepiece",
    }
    assert str(corpus.folder) not in (manifest.folder / "manifest.json").read_text()
    assert (manifest.dtype, manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == ("uint16", 500, 1)


def test_two_workers_another_folder_and_two_steps_give_the_same_bytes(
    corpus: Corpus, prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with tiny parts, so that both workers are busy and results must be put back in order."""
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 2000)
    (tmp_path / "moved").symlink_to(corpus.folder)
    moved = {
        key: [pattern.replace(str(corpus.folder), str(tmp_path / "moved")) for pattern in corpus.config[key]]
        for key in ("input", "validation_input")
    }
    config = corpus.write_config(tmp_path / "c.json", workers=2, output=str(tmp_path / "two"), **moved)
    assert main(["tokenizer", "--config", str(config)]) == 0
    assert outputs(tmp_path / "two").keys() == {"tokenizer.model", "tokenizer.json"}
    assert main(["shard", "--config", str(config)]) == 0
    assert outputs(tmp_path / "two") == outputs(prepared_once)


@pytest.fixture
def config(corpus: Corpus, prepared: Path, tmp_path: Path) -> Path:
    """The config that made `prepared`."""
    return corpus.write_config(tmp_path / "config.json", output=str(prepared))


def test_a_second_run_is_up_to_date_whatever_the_workers(
    config: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert run(config, "--set", "workers=2") == 0
    assert "up to date" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    (prepared / "train-00001.tar").unlink()
    assert run(config) == 2
    assert "missing file" in one_error(capsys)


def test_other_settings_are_refused_and_force_rebuilds(
    config: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "shard.tokens_per_shard=40000")
    assert run(config, *change) == 2
    error = one_error(capsys)
    assert "`shard.tokens_per_shard` was 5000, is now 40000; " in error
    assert "--force" in error
    old = set(outputs(prepared))
    assert run(config, *change, "--force") == 0
    assert len(Manifest.load(prepared).split("train")) == 1
    assert set(outputs(prepared)) < old  # shards of the former data are gone
    Manifest.load(prepared).check("full")


def test_other_raw_files_are_refused(
    corpus: Corpus, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(corpus.folder.glob("*/*.gz"))
    for path in names:
        (tmp_path / "raw" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / path.parent.name / path.name).write_bytes(path.read_bytes())
    body = json.loads(json.dumps(corpus.config).replace(str(corpus.folder), str(tmp_path / "raw")))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**body, "output": str(prepared)}))
    assert run(config) == 0  # the same content elsewhere is the same data
    *train, moved = body["input"]  # the same files in the same order, of which another one is held out
    held_out = {"input": train, "validation_input": [moved, *body["validation_input"]]}
    config.write_text(json.dumps({**body, **held_out, "output": str(prepared)}))
    assert run(config) == 2
    assert "train-00000.json.gz has changed or is another file" in one_error(capsys)
    config.write_text(json.dumps({**body, "output": str(prepared)}))
    changed = tmp_path / "raw" / "c4" / "c4-train.00001-of-00002.json.gz"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert run(config) == 2
    assert "c4-train.00001-of-00002.json.gz has changed" in one_error(capsys)
    changed.unlink()
    assert run(config) == 2
    assert "made from 5 raw files, there are now 4" in one_error(capsys)


@pytest.mark.parametrize("stays", [True, False])
def test_a_raw_file_that_changes_or_goes_while_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stays: bool
) -> None:
    """Of the same size, after it was read: the data are those of the former text, and are not up to date."""
    raw = tmp_path / "a.jsonl"
    raw.write_text("".join(json.dumps(c4_line(f"the text {n} " * 40)) + "\n" for n in range(50)))
    body = {"input": str(raw), "output": str(tmp_path / "out"), "workers": 1, "validation_fraction": 0.1}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**body, "tokenizer": {"vocab_size": 280}}))
    real = stages.write_data_manifest

    def change_and_write(*arguments: Any) -> None:
        before = raw.read_bytes()
        raw.unlink()
        if stays:
            raw.write_bytes(before.replace(b"text", b"TEXT"))
        real(*arguments)

    monkeypatch.setattr(stages, "write_data_manifest", change_and_write)
    assert run(config) == 0
    monkeypatch.undo()
    output = capsys.readouterr()
    assert ("a.jsonl has changed since it was read" in output.err) == stays
    manifest = Manifest.load(tmp_path / "out")
    manifest.check("full")
    assert all("the text" in text for text in decoded(manifest, "train"))
    assert not (tmp_path / "out" / ".work").exists()
    assert run(config) == 2
    assert ("a.jsonl has changed" if stays else "matches no file") in one_error(capsys)


def test_a_failing_rebuild_leaves_the_former_data_whole(
    config: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = outputs(prepared)
    bad = write_dump(tmp_path / "bad.json.gz", [c4_line("word " * 500)] * 8 + [b"{oops"])
    model = json.dumps(str(prepared / "tokenizer.model"))
    for workers in (1, 2):
        extra = (
            "--set",
            f"input={bad}",
            "--set",
            f"tokenizer.model={model}",
            "--set",
            f"workers={workers}",
            "--set",
            "ingest.max_bad_records=0",
            "--force",
        )
        assert run(config, *extra) == 2
        error = one_error(capsys)
        assert "1 of 135 records are malformed, more than ingest.max_bad_records 0.0 allows" in error
        assert "bad.json.gz:9: not JSON" in error
        assert outputs(prepared) == before


def test_a_crash_while_publishing_leaves_no_manifest(
    config: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    moves: list[Any] = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).parent == prepared and len(moves) == 3:
            raise OSError(28, "No space left on device")
        if Path(target).parent == prepared:
            moves.append(target)
        real(source, target)

    monkeypatch.setattr(output_files.os, "replace", replace)
    assert run(config, "--force") == 1
    assert not (prepared / "manifest.json").exists()
    monkeypatch.undo()
    assert run(config) == 0
    Manifest.load(prepared).check("full")
    assert not (prepared / ".work").exists()


def test_a_second_writer_is_refused(config: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (prepared / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(config, "--force") == 2
    assert "another preparation is writing to" in one_error(capsys)


@pytest.mark.parametrize("vocab_size", [500, 600])
def test_data_that_another_preparation_has_published_since_the_first_look_stay(
    config: Path, prepared: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That one held the lock until just before this one took it."""
    manifest, elsewhere = prepared / "manifest.json", prepared.parent / "manifest.json"
    before = outputs(prepared)
    manifest.rename(elsewhere)
    monkeypatch.setattr("data_prep.cli.check_room", lambda resolved: elsewhere.rename(manifest))
    code = run(config, "--set", f"tokenizer.vocab_size={vocab_size}")
    assert outputs(prepared) == before and not (prepared / ".work").exists()
    if vocab_size == 500:
        assert (code, capsys.readouterr().out) == (0, f"up to date: {prepared}\n")
    else:
        assert code == 2 and "holds other data: `tokenizer.vocab_size` was 500, is now 600" in one_error(capsys)


def test_validation_by_hash_splits_without_loss(
    corpus: Corpus, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body: dict[str, Any] = {
        "validation_input": [],
        "validation_fraction": 0.3,
        "tokenizer": {"model": str(prepared / "tokenizer.model")},
    }
    config = corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"), **body)
    assert run(config) == 0
    assert run(config, "--set", "tokenizer.vocab_size=8000", "--force") == 2
    assert "tokenizer.model has 500 pieces; set tokenizer.vocab_size to that" in one_error(capsys)
    manifest = Manifest.load(tmp_path / "out")
    train, validation = decoded(manifest, "train"), decoded(manifest, "validation")
    assert sorted(train + validation) == sorted(corpus.train)
    assert not set(train) & set(validation)
    assert 0.2 < len(validation) / len(corpus.train) < 0.4
    assert {record.split for record in manifest.provenance.inputs} == {"hash"}
    used = manifest.provenance.config["tokenizer"]
    assert used == {"model_sha256": hashlib.sha256((prepared / "tokenizer.model").read_bytes()).hexdigest()}


@pytest.mark.parametrize("held_out, fraction", [(True, 0.0), (False, 1e-9), (False, 0.0)])
def test_an_empty_held_out_split_is_said_with_what_would_fill_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: bool, fraction: float
) -> None:
    """`validation_fraction` is no way out where validation_input is given, whose texts train has too."""
    texts = [f"text {number} " * 40 for number in range(30)]
    write_dump(tmp_path / "train.json.gz", [c4_line(text) for text in texts])
    body: dict[str, Any] = {"input": str(tmp_path / "train.json.gz"), "output": str(tmp_path / "out"), "workers": 1}
    body |= {"tokenizer": {"vocab_size": 280}, "dedup": {"near": False}}
    if held_out:
        for name in ("validation", "test"):
            write_dump(tmp_path / f"{name}.json.gz", [c4_line(text) for text in texts[:5]])
            body[f"{name}_input"] = str(tmp_path / f"{name}.json.gz")
    else:
        body["validation_fraction"] = fraction
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert run(tmp_path / "config.json") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no document went" in line]
    if held_out:
        ends = "is left, and the table above says why"
        splits = ("validation", "test")
        assert lines == [f"warning: no document went to {n}; nothing of {n}_input {ends}" for n in splits]
    else:
        fix = "raise validation_fraction" if fraction else "validation_fraction is 0; train on it without a validation"
        assert len(lines) == 1 and f"no document went to validation; {fix}" in lines[0]


def test_shard_needs_the_tokenizer_of_this_config(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"))
    assert run(config, command="shard") == 2
    assert "no tokenizer in" in one_error(capsys)
    assert run(config, command="tokenizer") == 0
    assert run(config, "--set", "tokenizer.vocab_size=450", command="shard") == 2
    said = one_error(capsys)
    assert (
        "was not made with the `tokenizer` section of this config: `tokenizer.vocab_size` was 500, is now 450" in said
    )
    assert said.endswith("; make it with `python -m data_prep tokenizer --config CONFIG --force`")


def test_no_train_document_is_an_error(
    corpus: Corpus, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_dump(tmp_path / "empty.json.gz", [])
    tokenizer = {"model": str(prepared / "tokenizer.model")}
    config = corpus.write_config(
        tmp_path / "config.json", input=str(empty), output=str(tmp_path / "out"), tokenizer=tokenizer
    )
    assert run(config) == 2
    assert "no document for the train split" in one_error(capsys)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_reading_side_imports_neither_torch_nor_webdataset_nor_sentencepiece() -> None:
    code = (
        "import sys, data_prep.shards.reader; "
        "print(sorted({'torch', 'webdataset', 'sentencepiece', 'tqdm', 'pickle5'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_data_of_earlier_code_are_refused_with_what_has_changed(
    config: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by = int(versions.PREPARATION_VERSION)
    assert set(versions.CHANGES) <= {str(version) for version in range(made_by + 1)}
    assert str(made_by) in versions.CHANGES, "a reason for the newest version"
    monkeypatch.setattr(versions, "PREPARATION_VERSION", str(made_by + 2))
    monkeypatch.setitem(versions.CHANGES, str(made_by + 1), "lines are read backwards")
    monkeypatch.setitem(versions.CHANGES, str(made_by + 2), "twice")
    assert run(config) == 2
    expected = f"by data_prep version {made_by}, this is version {made_by + 2} (lines are read backwards; twice);"
    said = one_error(capsys)
    assert expected in said and said.endswith("or rebuild it with --force (training reads it as it is)")
    monkeypatch.undo()
    assert run(config, "--set", "shard.tokens_per_shard=30000") == 2
    assert one_error(capsys).endswith("or rebuild it with --force")
