"""Folders that cannot be written: one true sentence each, before anything is made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import DataError
from common.folders import check_writable_folder
from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.shards.format import Manifest
from launch.slurm import preparation
from tests.data_prep.conftest import Corpus
from tests.data_prep.outcome import one_error


def make_bad(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Outputs that cannot be, each with what must be said of it."""
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return {
        "file": (tmp_path / "file", f"output: {tmp_path}/file is a file and not a folder; name another"),
        "below a file": (tmp_path / "file/a/b", f"{tmp_path}/file is a file and not a folder, so there can be no"),
        "pipe": (tmp_path / "pipe", f"output: {tmp_path}/pipe is a named pipe and not a folder"),
        "loop": (tmp_path / "loop", f"output: {tmp_path}/loop is a link that leads back to itself; remove it"),
        "below a loop": (tmp_path / "loop/a", f"output: {tmp_path}/loop is a link that leads back to itself"),
        "dangling": (tmp_path / "dangling", f"is a link to {tmp_path}/nowhere, which is not there; make that folder"),
        "device": (Path("/dev/null"), "output: /dev/null is a device and not a folder"),
        "long": (tmp_path / ("x" * 300), "cannot be used: File name too long; name another folder"),
    }


NAMES = ("file", "below a file", "pipe", "loop", "below a loop", "dangling", "device", "long")


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_no_folder_is_one_sentence(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output, message = make_bad(tmp_path)[name]
    config = corpus.write_config(tmp_path / "config.json", output=str(output))
    before = sorted(os.listdir(tmp_path))
    assert main(["run", "--config", str(config)]) == 2
    assert message in one_error(capsys)
    assert preparation.main(["--config", str(config), "--tasks", "1", "--time", "1:00", "--dry-run"]) == 2
    assert message in one_error(capsys)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "mine"


def test_every_kind_is_tried(tmp_path: Path) -> None:
    assert tuple(make_bad(tmp_path)) == NAMES


@pytest.mark.parametrize(
    "place, name",
    [("out", ".work"), ("", "out")],
)
def test_a_file_where_the_work_folder_goes(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, name: str
) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / name).write_text("mine")
    config = corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"))
    assert main(["run", "--config", str(config)]) == 2
    assert f"{tmp_path / place / name} is a file and not a folder" in one_error(capsys)
    assert (tmp_path / place / name).read_text() == "mine"


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.access decides; a super-user, who may write everywhere, stands in for the others here."""
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    with pytest.raises(DataError, match=rf"^output: no permission to write into {tmp_path}/locked; name another"):
        check_writable_folder(tmp_path / "locked", "output")
    with pytest.raises(
        DataError, match=rf"no permission to write into {tmp_path}/locked to make {tmp_path}/locked/a/b;"
    ):
        check_writable_folder(tmp_path / "locked" / "a" / "b", "output")
    check_writable_folder(tmp_path / "other" / "a", "output")
    assert not (tmp_path / "other").exists(), "nothing is made"


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers all but a super-user."""
    closed, stat = tmp_path / "closed", Path.stat
    closed.mkdir()

    def refused(path: Path, **options: bool) -> os.stat_result:
        if closed in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    said = rf"^output: {closed}/a is out of reach: no permission to look into {closed}; name another folder$"
    with pytest.raises(DataError, match=said):
        check_writable_folder(closed / "a" / "b", "output")


def test_a_tilde_is_the_home_folder(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = corpus.write_config(tmp_path / "config.json", output="~/data/c4")
    assert main(["run", "--config", str(config)]) == 0
    Manifest.load(tmp_path / "home" / "data" / "c4").check("size")
    assert not (tmp_path / "~").exists()
    assert main(["verify", "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["run", "--config", str(config), "--set", "output=~nobody-of-this-name/x"]) == 2
    assert "output: ~nobody-of-this-name/x is in the home of a user that does not exist" in one_error(capsys)


def test_prepared_data_on_a_disk_that_is_read_only_are_up_to_date(
    corpus: Corpus, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = corpus.write_config(tmp_path / "config.json", output=str(prepared))
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert main(["run", "--config", str(config)]) == 0
    assert capsys.readouterr().out.startswith("up to date")
    assert main(["run", "--config", str(config), "--force"]) == 2
    assert f"output: no permission to write into {prepared}" in one_error(capsys)


def test_no_traceback_reaches_the_terminal(corpus: Corpus, tmp_path: Path) -> None:
    config = corpus.write_config(tmp_path / "config.json", output=str(make_bad(tmp_path)["loop"][0]))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: output: ")
