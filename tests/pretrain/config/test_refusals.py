"""What a start refuses before anything is allocated, its dry run refuses in the same words; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pretrain.cli import train as cli
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs
from tests.pretrain.saved import rewrite_state


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    keys = ("train.steps=2", "evaluate.sequences=0", "checkpoint.every_steps=1")
    run_ranks(train_runs, 1, [(small_config(prepared, *keys), folder)])
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that holds the configuration of `trained` and a copy of that run."""
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    shutil.copytree(trained, tmp_path / "run")
    shutil.copy(trained / "config.json", tmp_path / "small.json")
    return tmp_path


def tree(folder: Path) -> set[tuple[Path, bytes]]:
    """Every path below `folder`, with the content of files."""
    return {(path, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one sentence with which both the start and its dry run refuse."""

    def must_not_run(*_: object) -> int:
        raise AssertionError("the start was not refused")

    monkeypatch.setattr(cli, "run", must_not_run)
    before = tree(Path.cwd())
    messages = []
    for more in ([], DRY):
        assert cli.main([*arguments, *more]) == 2
        messages.append(capsys.readouterr().err)
    start, dry = messages
    assert start == dry
    assert start.startswith("error: ") and start.count("\n") == 1 and "Traceback" not in start, start
    assert tree(Path.cwd()) == before, "something was written"
    return start.removeprefix("error: ").rstrip("\n")


def damage_all(place: Path) -> None:
    for checkpoint in (place / "run" / "checkpoints").iterdir():
        os.truncate(checkpoint / "rank-00000.safetensors", 9)


def newer_format(place: Path) -> None:
    rewrite_state(place / "run" / "checkpoints" / "step-00000002", lambda state: state.update(format_version=9))


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda place: (place / name).symlink_to(target)


def file(name: str, content: bytes) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / name).write_bytes(content)

    return write


DRY = ["--dry-run", "--no-step"]
"""Steps are rehearsed in tests/pretrain/preflight."""
CONFIG = ["--config", "small.json"]
RESUME = [*CONFIG, "--run-dir", "new", "--set"]
REFUSED: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    # --config
    "config is empty": (None, ["--config", ""], "--config: is empty; name a configuration file"),
    "config is a folder": (None, ["--config", "."], "--config: . is a folder and holds no run"),
    "config is missing": (None, ["--config", "none.json"], "--config: there is no file none.json"),
    "config is below a file": (None, ["--config", "small.json/x"], "--config: small.json/x cannot be read: Not a dir"),
    "config is a dangling link": (link("c.json", "gone"), ["--config", "c.json"], "--config: there is no file c.json"),
    "config is a circle": (
        link("c.json", "c.json"),
        ["--config", "c.json"],
        "--config: c.json cannot be read: Too many",
    ),
    "config has a long name": (None, ["--config", "x" * 300], "--config: xxx"),
    "config is not UTF-8": (
        file("c.json", b'{"description": "\xe9"}'),
        ["--config", "c.json"],
        "--config: c.json is not UTF-8 text (byte 17); save it as UTF-8",
    ),
    "config is UTF-16": (
        file("c.json", '{"a": 1}'.encode("utf-16")),
        ["--config", "c.json"],
        "--config: c.json is not UTF-8 text (byte 0)",
    ),
    "config is not JSON": (file("c.json", b"{bad"), ["--config", "c.json"], "--config: c.json is not JSON: line 1"),
    "config is nothing": (file("c.json", b""), ["--config", "c.json"], "--config: c.json is not JSON: line 1"),
    "config is a list": (file("c.json", b"[1]"), ["--config", "c.json"], "--config: c.json holds a list"),
    "config is null": (file("c.json", b"null"), ["--config", "c.json"], "--config: c.json holds null"),
    "config is deep": (
        file("c.json", b"[" * 100_000),
        ["--config", "c.json"],
        "--config: c.json cannot be read as JSON",
    ),
    "config has a long number": (
        file("c.json", b'{"train": {"steps": ' + b"9" * 5000 + b"}}"),
        ["--config", "c.json"],
        "train.steps: is a number of 5,000 digits, 99999999999999999999...; write at most 100",
    ),
    "set has a long number": (
        None,
        [*CONFIG, "--set", "train.steps=" + "9" * 5000],
        "train.steps: is a number of 5,000",
    ),
    "set is deep": (None, [*CONFIG, "--set", "train.steps=" + "[" * 100_000], "train.steps: the value of --set"),
    "set has NUL": (
        None,
        [*CONFIG, "--set", r'data.manifest="a\u0000b"'],
        "data.manifest: 'a\\x00b' holds a character",
    ),
    "set has half a pair": (None, [*CONFIG, "--set", r'description="\ud800"'], "description: '\\ud800' holds a char"),
    # --run-dir
    "run dir is empty": (None, [*CONFIG, "--run-dir", ""], "--run-dir: is empty; name a folder"),
    "run dir is Latin-1": (None, [*CONFIG, "--run-dir", "caf\udce9"], "--run-dir: {place}/caf\\udce9 is not UTF-8"),
    "run dir is a file": (
        None,
        [*CONFIG, "--run-dir", "small.json"],
        "small.json is a file and not a folder; name another",
    ),
    "run dir is below a file": (
        None,
        [*CONFIG, "--run-dir", "small.json/run"],
        "small.json is a file and not a folder, so",
    ),
    "run dir is a dangling link": (
        link("new", "gone"),
        [*CONFIG, "--run-dir", "new"],
        "new is a link to gone, which is not there; make that folder",
    ),
    "run dir is below a dangling link": (
        link("new", "gone"),
        [*CONFIG, "--run-dir", "new/run"],
        "new is a link to gone",
    ),
    "a file in the place of tensorboard": (
        file("run/tensorboard", b"x"),
        [*CONFIG, "--run-dir", "run"],
        "run/tensorboard is a file where the run needs a folder; move it away",
    ),
    "manifest is empty": (
        None,
        [*RESUME, "data.manifest="],
        "data.manifest: the place of a data set is empty; set it to",
    ),
    # checkpoint.resume
    "resume is empty": (None, [*RESUME, "checkpoint.resume="], "checkpoint.resume: is empty; set it to auto, never or"),
    "resume is a run": (
        None,
        [*RESUME, "checkpoint.resume=run"],
        "/run is a run folder, not a checkpoint; its newest is: set it to {place}/run/checkpoints/step-00000002",
    ),
    "resume is the checkpoints of a run": (
        None,
        [*RESUME, "checkpoint.resume=run/checkpoints"],
        "is a folder of checkpoints, not a checkpoint; its newest is: set it to {place}/run/checkpoints/step-00000002",
    ),
    "resume is a file of a checkpoint": (
        None,
        [*RESUME, "checkpoint.resume=run/checkpoints/step-00000001/state.json"],
        "is a file, not the folder of a checkpoint; set it to its folder, {place}/run/checkpoints/step-00000001",
    ),
    "resume is another file": (None, [*RESUME, "checkpoint.resume=small.json"], "is a file, not the folder of a check"),
    "resume is another folder": (None, [*RESUME, "checkpoint.resume=."], "is no checkpoint (it holds no state.json)"),
    "resume is nowhere": (
        None,
        [*RESUME, "checkpoint.resume=gone"],
        "checkpoint.resume: there is no checkpoint folder",
    ),
    "resume is somebody's": (None, [*RESUME, "checkpoint.resume=~nobody-here/x"], "there is no checkpoint folder"),
    "resume has a long name": (
        None,
        [*RESUME, "checkpoint.resume=" + "x" * 300],
        "(File name too long)",
    ),
    "initial weights are somebody's": (
        None,
        [*CONFIG, "--set", "train.init_from=~nobody-here/x"],
        "init_from: there is no",
    ),
    "initial weights have a long name": (
        None,
        [*CONFIG, "--set", f"train.init_from={'x' * 300}"],
        "cannot be read: File name too long",
    ),
    "choices are somebody's": (None, [*CONFIG, "--set", "train.replay_routing=~nobody-here/x"], "holds no record.json"),
    "choices have a long name": (
        None,
        [*CONFIG, "--set", f"train.replay_routing={'x' * 300}"],
        "record.json cannot be read: File name too long",
    ),
    "resume is damaged": (
        damage_all,
        [*RESUME, "checkpoint.resume=run/checkpoints/step-00000001"],
        "no checkpoint is whole (checkpoint {place}/run/checkpoints/step-00000001: rank-00000.safetensors is 9 bytes",
    ),
    "resume is never": (
        None,
        [*CONFIG, "--run-dir", "run", "--set", "checkpoint.resume=never"],
        "checkpoint.resume: is never, but {place}/run holds 2 checkpoints",
    ),
    "no checkpoint is whole": (damage_all, [*CONFIG, "--run-dir", "run"], "no checkpoint is whole (checkpoint {place}"),
    "a checkpoint is of another format": (
        newer_format,
        [*CONFIG, "--run-dir", "run"],
        "has format 9, but this version re",
    ),
    # the rest of a start
    "data is nowhere": (None, [*CONFIG, "--set", "data.manifest=gone"], "data.manifest: there is no"),
    "data has a long name": (
        lambda place: (place / "configs" / "data").mkdir(parents=True),  # where its recipe is looked for
        [*CONFIG, "--set", "data.manifest=" + "x" * 300],
        "data.manifest: there is no",
    ),
    "data is somebody's": (None, [*CONFIG, "--set", "data.manifest=~nobody-here/x"], "data.manifest: there is no"),
    "the layout needs more ranks": (None, [*CONFIG, "--set", "batch.global_sequences=9"], "batch.global_sequences: 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_start_and_dry_run_refuse_alike(
    place: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, arguments, words = REFUSED[name]
    if prepare is not None:
        prepare(place)
    message = refusal(arguments, capsys, monkeypatch)
    assert words.format(place=place) in message, message


def test_what_may_not_be_written_to_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.folders.os.access", lambda path, mode: Path(path) != place / "run")
    message = refusal([*CONFIG, "--run-dir", "run/new/deep"], capsys, monkeypatch)
    assert message == (
        f"--run-dir: no permission to write into {place}/run to make {place}/run/new/deep; name another folder"
    )


def test_one_command_allows_every_changed_key(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice holds what was allowed already, and following it is enough."""
    changes = ["optimizer.learning_rate=0.01", "optimizer.eps=1e-6", "train.seed=3", "model.dropout=0.1"]
    arguments = ["--config", "run", *(part for change in changes for part in ("--set", change))]
    arguments += ["--set", 'checkpoint.allow_changes=["optimizer.eps"]']
    message = refusal(arguments, capsys, monkeypatch)
    assert "model.dropout: was 0.0 in" in message
    assert "(and 2 more: optimizer.learning_rate, train.seed)" in message
    advice = message.partition("--set '")[2].rstrip("'")
    key, _, listed = advice.partition("=")
    assert key == "checkpoint.allow_changes"
    assert json.loads(listed) == ["optimizer.eps", "model.dropout", "optimizer.learning_rate", "train.seed"]
    assert cli.main([*arguments, "--set", advice, *DRY]) == 0


def test_advice_for_a_key_that_this_version_has_not(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its section can be allowed: a key that does not exist could not be listed."""
    for checkpoint in (place / "run" / "checkpoints").iterdir():
        rewrite_state(checkpoint, lambda state: state["config"]["schedule"].update(ancient=1))
    message = refusal(["--config", "run"], capsys, monkeypatch)
    assert message.startswith("schedule.ancient: was 1 in")
    advice = message.partition("--set '")[2].rstrip("'")
    assert advice == 'checkpoint.allow_changes=["schedule"]'
    assert cli.main(["--config", "run", "--set", advice, *DRY]) == 0


@pytest.mark.parametrize("given", ["run", "run/config.json", "./run/"])
def test_the_configuration_of_a_run_means_that_run(place: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(config: Config, sources: Sources, run_dir: Path, *_: Any) -> int:
        started.append((config, run_dir))
        return 0

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["--config", given]) == 0
    assert started[0][1] == place / "run"
    assert to_json(started[0][0]) == json.loads((place / "run" / "config.json").read_text())
    assert cli.main(["--config", given, "--run-dir", "other"]) == 0
    assert started[1][1] == place / "other"
    shutil.copy("run/config.json", "config.json")  # of no run
    assert cli.main(["--config", "config.json"]) == 0
    assert started[2][1] == place / "runs" / "config"


def test_a_mark_at_the_beginning_of_a_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "marked.json").write_bytes(b"\xef\xbb\xbf" + (place / "small.json").read_bytes())
    assert cli.main(["--config", "marked.json", *DRY]) == 0


def test_a_dry_run_reads_the_checkpoint_that_a_start_would(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that only the sha256 shows: one damaged checkpoint is passed over, two are refused."""
    derived = Mock(wraps=cli.print_derived)
    monkeypatch.setattr(cli, "print_derived", derived)
    for step, code in ((2, 0), (1, 2)):
        path = place / "run" / "checkpoints" / f"step-0000000{step}" / "rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        assert cli.main(["--config", "run", *DRY]) == code
        captured = capsys.readouterr()
        words = f"checkpoint {path.parent}: rank-00000.safetensors does not match its sha256"
        assert words in (captured.out if code == 0 else captured.err)
        if code == 0:
            assert f"continues from {place}/run/checkpoints/step-00000001, step 1: every file has its" in captured.out
            assert derived.call_args.args[4].progress.step == 1
    assert captured.err.startswith("error: no checkpoint is whole (")
