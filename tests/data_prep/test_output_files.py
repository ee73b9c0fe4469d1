"""`output`: what is not the preparation's own is refused by name and never touched; what it made survives a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.report.stats import PLOTS, check_own, write_report
from data_prep.run import output_files
from data_prep.shards.format import Manifest
from data_prep.work import folder as work
from launch.slurm import preparation
from tests.data_prep.conftest import Corpus, c4_line, write_dump
from tests.data_prep.kills import Killed
from tests.data_prep.outcome import one_error, outputs

FOREIGN = (
    "train-00000.tar", "train-00099.tar", "validation-00000.idx.safetensors", "tokenizer.model", "tokenizer.json",
    "quarantine.jsonl", "filter_samples.jsonl", "duplicate_samples.jsonl", "run.json",
)  # fmt: skip
DISK = Path("/dev/shm")  # a file system of its own
COMMANDS = ("run", "ingest", "filter", "dedup", "tokenizer", "encode", "shard")
OTHERS = (
    "train-1.tar",
    "train-00000.tar.bak",
    "notes.txt",
    ".lock",
    ".work/mine/a.zst",
    ".work/ingest-x",
    "slurm/a.log",
)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine: " + name.encode())


@pytest.fixture
def config(corpus: Corpus, tmp_path: Path) -> Path:
    return corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_by_name_before_any_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    put(tmp_path / "out", name)
    before = content_of(tmp_path / "out")
    for command in COMMANDS:
        assert main([command, "--config", str(config)]) == 2
        assert f"holds {name}, which no preparation made" in one_error(capsys)
    arguments = ["--config", str(config), "--tasks", "2", "--time", "1:00:00", "--dry-run"]
    assert preparation.main(arguments) == 2
    assert f"holds {name}, which no preparation made" in one_error(capsys)
    assert content_of(tmp_path / "out") == before


@pytest.mark.parametrize("content", ["not JSON", '{"name": "a web page"}', "[1]"])
def test_a_manifest_of_something_else_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    put(tmp_path / "out", "manifest.json")
    (tmp_path / "out" / "manifest.json").write_text(content)
    before = content_of(tmp_path / "out")
    assert main(["run", "--config", str(config)]) == 2
    assert "holds manifest.json, which no preparation made and this one would replace" in one_error(capsys)
    assert content_of(tmp_path / "out") == before


def test_other_files_in_the_output_and_its_work_folder_stay(
    config: Path, prepared_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "out", *OTHERS, ".work.removed/mine")
    assert main(["run", "--config", str(config)]) == 0
    assert main(["run", "--config", str(config), "--force", "--set", "shard.tokens_per_shard=40000"]) == 0
    left = content_of(tmp_path / "out")
    assert {name: left[name] for name in OTHERS} == {name: b"mine: " + name.encode() for name in OTHERS}
    assert left[".work.removed/mine"] == b"mine: .work.removed/mine"
    stages = [name for name in left if name.startswith(".work/") and name not in OTHERS]
    assert stages == [], "what the preparation made is gone"


def test_a_work_folder_on_another_disk_gives_the_same_files(config: Path, prepared_once: Path, tmp_path: Path) -> None:
    """No rename leads from one disk to another; new data also take the place of former ones."""
    if not DISK.is_dir() or DISK.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=DISK) as elsewhere:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".work").symlink_to(elsewhere)
        assert main(["run", "--config", str(config), "--set", "shard.tokens_per_shard=40000"]) == 0
        assert main(["run", "--config", str(config), "--force"]) == 0
        assert list(Path(elsewhere).iterdir()) == [], "what the preparation made is gone"
    assert outputs(tmp_path / "out") == outputs(prepared_once)


def test_force_replaces_what_is_in_the_way_and_nothing_else(config: Path, tmp_path: Path) -> None:
    put(tmp_path / "out", *FOREIGN)
    assert main(["run", "--config", str(config), "--force"]) == 0
    Manifest.load(tmp_path / "out").check("full")
    left = content_of(tmp_path / "out")
    assert left["train-00099.tar"] == b"mine: train-00099.tar", "not in the way"
    assert main(["run", "--config", str(config)]) == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["quarantine.jsonl", "train-00000.tar", "tokenizer.json"])
def test_a_raw_file_never_goes(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, force: list[str]
) -> None:
    """With the raw folder as output, also behind a link."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / name).write_text("".join(json.dumps(c4_line(f"text {n} " * 40)) + "\n" for n in range(50)))
    (tmp_path / "link").symlink_to(raw)
    before = content_of(raw)
    for output, given in (("raw", "raw"), ("link", "raw"), ("raw", "link")):
        config = corpus.write_config(
            tmp_path / "c.json", input=str(tmp_path / given / name), output=str(tmp_path / output), validation_input=[]
        )
        assert main(["run", "--config", str(config), *force]) == 2
        assert f"holds the raw {name}, which the data would replace" in one_error(capsys)
        assert content_of(raw) == before


def test_raw_files_of_other_names_may_lie_in_the_output(corpus: Corpus, tmp_path: Path) -> None:
    write_dump(tmp_path / "raw" / "a.json.gz", [c4_line(f"word {n} and {n * n} " * 20) for n in range(80)])
    before = content_of(tmp_path / "raw")
    config = corpus.write_config(
        tmp_path / "c.json",
        input=str(tmp_path / "raw" / "a.json.gz"),
        output=str(tmp_path / "raw"),
        validation_input=[],
        tokenizer={"vocab_size": 280},
    )
    assert main(["run", "--config", str(config)]) == 0
    assert content_of(tmp_path / "raw")["a.json.gz"] == before["a.json.gz"]


def test_a_model_that_lies_in_the_output_is_kept(
    corpus: Corpus, prepared_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "out" / "tokenizer.model"
    model.parent.mkdir()
    shutil.copyfile(prepared_once / "tokenizer.model", model)
    content = model.read_bytes()
    config = corpus.write_config(tmp_path / "c.json", output=str(tmp_path / "out"), tokenizer={"model": str(model)})
    assert main(["run", "--config", str(config)]) == 2
    assert "holds tokenizer.model, which no preparation made" in one_error(capsys)
    assert main(["run", "--config", str(config), "--force"]) == 0
    assert model.read_bytes() == content


def test_a_folder_in_the_way_is_refused_whatever_is_asked(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "out" / "train-00000.tar", "a")
    for force in ([], ["--force"]):
        assert main(["run", "--config", str(config), *force]) == 2
        assert "holds the folder train-00000.tar, where a file must go" in one_error(capsys)


@pytest.mark.parametrize("after", [1, 2, 6, 11, 16, 20, 10**6])
def test_what_it_made_is_known_as_its_own_after_a_kill_while_files_are_moved(
    config: Path, prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The same command goes on without --force, also a rebuild of which half of the former data is gone; foreign files
    that are not in the way stay."""
    out = Path(shutil.copytree(prepared_once, tmp_path / "out"))
    put(out, "notes.txt", "train-0.tar")
    steps = 0

    def counted(real: Any) -> Any:
        def step(*paths: Any, **options: Any) -> Any:
            nonlocal steps
            if Path(paths[-1]).parent == out:
                steps += 1
                if steps > after:
                    raise Killed
            return real(*paths, **options)

        return step

    change = ["--set", "shard.tokens_per_shard=40000"]
    with monkeypatch.context() as patch:
        patch.setattr(output_files.os, "replace", counted(os.replace))
        patch.setattr(work.os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        if after < 10**6:
            with pytest.raises(Killed):
                main(["run", "--config", str(config), *change, "--force"])
        else:
            assert main(["run", "--config", str(config), *change, "--force"]) == 0
    assert main(["run", "--config", str(config), *change]) == 0
    made = {name: digest for name, digest in outputs(out).items() if name not in ("notes.txt", "train-0.tar")}
    Manifest.load(out).check("full")
    listed = {entry for split in Manifest.load(out).splits.values() for e in split for entry in (e.file, e.index_file)}
    records = {record.file for record in Manifest.load(out).provenance.records}
    assert set(made) == listed | records | {"manifest.json", "tokenizer.model", "tokenizer.json"}, "no former shard"
    assert (out / "notes.txt").read_bytes() == b"mine: notes.txt" and (out / "train-0.tar").exists()
    assert not (out / ".work").exists()


def test_the_report_replaces_no_foreign_file(
    prepared_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.md", PLOTS[0]):
        put(tmp_path / name[:3], name)
        assert main(["stats", str(prepared_once), "--out", str(tmp_path / name[:3])]) == 2
        assert f"holds {name}, which no report of ours is" in one_error(capsys)
        assert content_of(tmp_path / name[:3]) == {name: b"mine: " + name.encode()}
    assert main(["stats", str(prepared_once), "--out", str(tmp_path / "own")]) == 0
    check_own(tmp_path / "own")
    made = {path.name for path in (tmp_path / "own").iterdir()}
    assert made <= {"report.md", *PLOTS} and "report.md" in made
    report = (tmp_path / "own" / "report.md").read_text()
    assert report.startswith(f"# Prepared data {Manifest.load(prepared_once).digest[:12]}\n")


def test_a_report_that_fails_leaves_the_one_of_before_and_a_new_one_no_plot_of_it(
    prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, out = Manifest.load(prepared_once), tmp_path / "own"
    write_report(manifest, out)
    (out / "duplicates.png").write_bytes(b"of an earlier report")
    before = content_of(out)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("common.files.os.fsync", full)
        for folder in (out, tmp_path / "new"):
            with pytest.raises(OSError, match="No space left"):
                write_report(manifest, folder)
    assert content_of(out) == before and [path.name for path in tmp_path.iterdir()] == ["own"]
    write_report(manifest, out)
    del before["duplicates.png"]
    assert content_of(out) == before


def test_what_a_killed_run_left_half_written_in_the_output_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    """Of its own alone: a kill while run.json was written left such a file for ever."""
    out = tmp_path / "out"
    config = str(corpus.write_config(tmp_path / "config.json", output=str(out)))
    assert main(["run", "--config", config]) == 0
    whole = {path.name for path in out.iterdir()}
    own = (".run.json.host-18643-a0744443.tmp", ".train-000000.tar.my_host-1-00000000.tmp")
    others = (".notes.json.host-1-00000000.tmp", ".run.json.tmp")
    for begins_anew in (False, True):
        if begins_anew:
            (out / "manifest.json").unlink()
        else:
            (out / ".work").mkdir()  # which is removed after run.json is written
        for name in own + others:
            (out / name).write_text("half")
        assert main(["run", "--config", config]) == 0
        assert {path.name for path in out.iterdir()} == whole | set(others)
