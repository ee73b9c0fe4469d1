"""launch/checkpoint.py: what people see of a run's checkpoints, and the weights they take away."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pretrain.checkpoint.loading
import pretrain.cli.checkpoint
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.cli.analyze import main as analyze
from pretrain.cli.checkpoint import main
from pretrain.cli.compare import main as compare
from pretrain.cli.export import main as export
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import events, gradient_error, metrics, small_config, train_runs
from tests.pretrain.saved import add_moving_average, rewrite_state, whole_tensors


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4 of two ranks that share everything out."""
    folder = tmp_path_factory.mktemp("run")
    keys = ("train.steps=4", "evaluate.sequences=8", "evaluate.every_steps=2", "checkpoint.every_steps=2")
    run_ranks(train_runs, 2, [(small_config(prepared, *keys, "parallel.zero=3"), folder)])
    return folder


def test_list(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    place = copy / "checkpoints"
    shutil.copytree(place / "step-00000004", place / "superseded-1-step-00000004")
    shutil.copytree(place / "step-00000004", place / "step-00000006.partial")
    shutil.copytree(place / "step-00000004", place / "step-100000000.partial")  # more digits, and yet later
    (place / "step-00000005²").mkdir()  # a digit to str.isdigit, and none to int
    shutil.copytree(place / "step-00000004", place / "step-00000007")
    rewrite_state(place / "step-00000007", lambda state: state.update(format_version=1))
    os.truncate(place / "step-00000004" / "rank-00001.safetensors", 9)
    assert main(["list", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "saved", "bytes", "layout", "state", "loss", "validation"]
    validation = next(event["loss"] for event in events(copy, "validation") if event["step"] == 2)
    size = sum(
        f.stat().st_size for f in (place / "step-00000002").iterdir() if f.name not in ("state.json", "commit.json")
    )
    words = lines[1].split()
    assert words[0] == "step-00000002" and words[1].startswith("20") and words[3] == f"{size:,}"
    assert words[4:10] == ["TP1", "PP1", "DP2", "EP1", "ZeRO-3", "whole"]
    assert words[10:] == [f"{metrics(copy)[1]['loss']:.4f}", f"{validation:.4f}"]
    assert "damaged: rank-00001.safetensors is 9 bytes, not" in lines[2]
    assert "has format 1, but this version reads 2" in lines[3]
    assert lines[4].startswith("step-00000005²") and "damaged" in lines[4]
    assert lines[5].startswith("step-00000006.partial") and "partial: being written, or left by" in lines[5]
    assert lines[6].startswith("step-100000000.partial")
    assert lines[7].startswith("superseded-1-step-00000004") and " whole " in lines[7]
    assert len(lines) == 8


@pytest.mark.parametrize("moment", ["before it is read", "while its files are counted", "after it was read"])
def test_a_list_shows_what_a_run_makes_of_its_checkpoints_meanwhile(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """One gets its name, and an older one goes."""
    copy = tmp_path / "run"
    place = copy / "checkpoints"
    shutil.copytree(run_dir, copy)
    (place / "step-00000004").rename(place / "step-00000004.partial")
    row = pretrain.cli.checkpoint._row

    def commits() -> None:
        if (place / "step-00000002").exists():
            (place / "step-00000004.partial").rename(place / "step-00000004")
            shutil.rmtree(place / "step-00000002")

    def read(path: Path) -> tuple[str, ...]:
        if moment == "before it is read":
            commits()
        elif moment == "while its files are counted" and path.name.endswith(".partial"):
            stat = Path.stat

            def counted(one: Path, **options: Any) -> os.stat_result:
                if one.parent == path:
                    commits()
                return stat(one, **options)

            with monkeypatch.context() as patched:
                patched.setattr(Path, "stat", counted)
                return row(path)
        found = row(path)
        if moment == "after it was read":
            commits()
        return found

    monkeypatch.setattr(pretrain.cli.checkpoint, "_row", read)
    assert main(["list", str(copy)]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[0] == "step-00000004" and " whole " in line


def test_verify(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.count("whole, every sha256 matches") == 2
    oldest = copy / "checkpoints" / "step-00000002"
    content = bytearray((oldest / "rank-00000.safetensors").read_bytes())
    content[-5] ^= 1
    (oldest / "rank-00000.safetensors").write_bytes(content)
    assert main(["verify", str(copy)]) == 2, "also where those behind it are whole"
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step-00000002: DAMAGED: rank-00000.safetensors does not match its sha256"
    assert out[1].startswith("step-00000004: whole")
    assert main(["verify", str(oldest)]) == 2
    assert main(["verify", str(oldest.with_name("step-00000004"))]) == 0


def test_convert(run_dir: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert main(["convert", str(run_dir), "--to", str(tmp_path / "out")]) == 0
    assert "of step 4" in capsys.readouterr().out
    names = ["config.json", "model.safetensors", "tokenizer.model", "weights.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    about = json.loads((tmp_path / "out" / "weights.json").read_text())
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert (about["step"], about["tokens"], about["loss"]) == (4, 4 * 8 * 16, metrics(run_dir)[-1]["loss"])
    assert about["data_digest"] == manifest["digest"]
    assert about["tokenizer"]["sha256"] == manifest["tokenizer"]["sha256"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = whole_tensors(newest, prefixes=("master/",))
    assert {f"master/{name}" for name in found} == expected.keys()
    assert all(torch.equal(value, expected[f"master/{name}"]) for name, value in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["d_model"] == 24
    assert main(["convert", str(run_dir), "--to", str(tmp_path / "out")]) == 2
    assert "exists; name another folder" in capsys.readouterr().err
    assert main(["convert", str(newest.with_name("step-00000002")), "--to", str(tmp_path / "other")]) == 0


@pytest.mark.parametrize("command", ["convert", "average"])
def test_who_waits_for_weights_to_be_written_sees_how_far_they_are(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Those of a billion parameters take minutes on a slow disk."""
    bars: dict[str, list[int]] = {}

    def count_bytes(description: str, total: int) -> Callable[[int], None]:
        counts = bars[description] = [total]
        return counts.append

    for module in ("common.progress_bar", "pretrain.checkpoint.average"):
        monkeypatch.setattr(f"{module}.count_bytes", count_bytes)
    paths = list_checkpoints(run_dir / "checkpoints")
    assert main([command, *map(str, paths[-1:] if command == "convert" else paths), "--to", str(tmp_path / "out")]) == 0
    total, *counts = bars["model.safetensors" if command == "convert" else "out"]
    written = next((tmp_path / "out").glob("*.safetensors")).stat().st_size
    parameters = load_file(next((tmp_path / "out").glob("*.safetensors"))).values()
    assert total == sum(4 * parameter.numel() for parameter in parameters)
    assert len(counts) > len(parameters) and sum(counts) == written  # a header, then a block or more of each


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_called_damaged(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    damaged_file = Checkpoint.damaged_file

    def removed(checkpoint: Checkpoint, **options: Any) -> str | None:
        shutil.rmtree(copy / "checkpoints" / "step-00000002", ignore_errors=True)  # as keep_last=1 does
        return damaged_file(checkpoint, **options)

    monkeypatch.setattr(Checkpoint, "damaged_file", removed)
    assert main(["verify", str(copy)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step-00000002: removed meanwhile, by a run that goes on (checkpoint.keep_last)"
    assert second == "step-00000004: whole, every sha256 matches"


@pytest.mark.parametrize(
    "arguments", [["convert", "{0}/run", "{0}/out"], ["average", "{0}/run", "{0}/run", "--to={0}/out"]]
)
def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_said_to_be_gone(
    arguments: list[str],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest = list_checkpoints(shutil.copytree(run_dir, tmp_path / "run") / "checkpoints")[-1]
    damaged_file = Checkpoint.damaged_file

    def removed(checkpoint: Checkpoint, **options: Any) -> str | None:
        shutil.rmtree(newest, ignore_errors=True)
        return damaged_file(checkpoint, **options)

    monkeypatch.setattr(Checkpoint, "damaged_file", removed)
    assert main([part.format(tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: PATH: {newest} was removed while it was read") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints_is_not_called_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["verify", str(tmp_path / "run")]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: PATH: {tmp_path / 'run'} holds no checkpoints; name a checkpoint (step-...) or a run folder\n",
    )


def test_a_checkpoint_is_named_also_where_it_is_the_current_folder(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_dir / "checkpoints" / "step-00000002")
    assert main(["verify", "."]) == 0
    assert capsys.readouterr().out == "step-00000002: whole, every sha256 matches\n"


def test_a_converted_moving_average_does_not_have_the_losses_of_the_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = list_checkpoints(shutil.copytree(trained, tmp_path / "run") / "checkpoints")[-1]
    rewrite_state(newest, lambda state: state.update(loss=5.0, validation_loss=6.0))
    average = add_moving_average(newest, lambda weight: weight + 1)
    assert main(["convert", str(newest), "--to", str(tmp_path / "of_average"), "--ema"]) == 0
    assert ", moving average of the weights\n" in capsys.readouterr().out
    assert main(["convert", str(newest), "--to", str(tmp_path / "of_weights")]) == 0
    assert "moving average" not in capsys.readouterr().out
    found = load_file(tmp_path / "of_average" / "model.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in found.items())
    told = [json.loads((tmp_path / name / "weights.json").read_text()) for name in ("of_average", "of_weights")]
    assert [one.pop("moving_average") for one in told] == [True, False]
    losses = [(one.pop("loss"), one.pop("validation_loss")) for one in told]
    assert losses == [(None, None), (5.0, 6.0)]
    assert told[0] == told[1]


def test_convert_finds_the_tokenizer_or_says_why_not(
    run_dir: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = tmp_path / "step-00000004"
    shutil.copytree(list_checkpoints(run_dir / "checkpoints")[-1], newest)
    gone = str(tmp_path / "gone")
    rewrite_state(newest, lambda state: state["config"]["data"].update(manifest=gone))
    assert main(["convert", str(newest), "--to", str(tmp_path / "without")]) == 0
    said = capsys.readouterr().out
    assert f"no tokenizer was written: data.manifest: there is no {gone}" in said and "name the place" in said
    names = ["config.json", "model.safetensors", "weights.json"]
    assert sorted(p.name for p in (tmp_path / "without").iterdir()) == names
    assert json.loads((tmp_path / "without" / "weights.json").read_text())["tokenizer"] is None

    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    assert main(["convert", str(newest), "--to", str(tmp_path / "with"), "--data", str(moved)]) == 0
    model = tmp_path / "with" / "tokenizer.model"
    assert model.read_bytes() == (prepared / "tokenizer.model").read_bytes()
    assert f"{model}: the tokenizer" in capsys.readouterr().out
    assert main(["convert", str(run_dir), "--to", str(tmp_path / "no"), "--data", gone]) == 2  # mistyped
    assert f"--data {gone}: " in capsys.readouterr().err

    (moved / "tokenizer.model").write_bytes(b"another")
    assert main(["convert", str(newest), "--to", str(tmp_path / "no"), "--data", str(moved)]) == 2
    assert "tokenizer.model does not match its manifest" in capsys.readouterr().err
    rewrite_state(newest, lambda state: state.update(manifest_digest="0" * 64))  # the same tokenizer is enough
    assert main(["convert", str(newest), "--to", str(tmp_path / "anew"), "--data", str(prepared)]) == 0
    assert (tmp_path / "anew" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    capsys.readouterr()
    rewrite_state(newest, lambda state: state.update(tokenizer_sha256="0" * 64))
    assert main(["convert", str(newest), "--to", str(tmp_path / "no"), "--data", str(prepared)]) == 2
    assert "is not the data set that the run read" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_convert_leaves_what_it_did_not_write(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is taken is refused; a disk that is full at the end takes away what was written, and only that."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tokenizer.model", "config.json", "weights.json", "model.safetensors.partial"):
        (out / name).write_text("mine")
        assert main(["convert", str(run_dir), "--to", str(out)]) == 2
        assert f"{name} exists; name another folder" in capsys.readouterr().err
        assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]
        (out / name).unlink()
    (out / "notes").write_text("mine")

    def full(path: Path, entries: list[Any], wrote: Any) -> dict[str, Any]:
        path.write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("pretrain.checkpoint.storage.write_safetensors", full)
    assert main(["convert", str(run_dir), "--to", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("notes", "mine")]
    assert main(["convert", str(run_dir), "--to", str(tmp_path / "new" / "deep")]) == 2
    assert capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["convert", str(run_dir), "--to", str(out / "notes")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_shows_how_to_load_the_weights(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"
    [snippet] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert "pretrain" not in snippet and "deepspeed" not in snippet
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(run_dir), "--to", "weights"]) == 0
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(compile(snippet, str(page), "exec"), names)
    assert capsys.readouterr().out.startswith("4 ")
    saved = whole_tensors(list_checkpoints(run_dir / "checkpoints")[-1], prefixes=("master/",))
    loaded = dict(names["model"].named_parameters())
    assert {f"master/{name}" for name in loaded} == saved.keys()
    assert all(torch.equal(value, saved[f"master/{name}"]) for name, value in loaded.items())
    assert names["logits"].shape[2] == names["config"].vocab_size and torch.isfinite(names["logits"]).all()


def test_convert_holds_one_parameter_at_a_time(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = [], pretrain.checkpoint.loading.read

    def noted(reader, state):  # type: ignore[no-untyped-def]
        asked.append(list(state))
        read(reader, state)

    monkeypatch.setattr(pretrain.checkpoint.loading, "read", noted)
    assert main(["convert", str(run_dir), "--to", str(tmp_path / "out")]) == 0
    assert all(len(names) == 1 for names in asked) and len(asked) > 10


@pytest.mark.slow
def test_convert_a_tied_model_of_tensor_parallel_stages(prepared: Path, tmp_path: Path) -> None:
    """Whole parameters under the names of one process: no shard, no copy of the embedding."""
    keys = ("train.steps=2", "evaluate.sequences=0")
    layout = Layout(tensor=2, pipeline=2, tied=True)
    run_ranks(train_runs, 4, [(config_of(prepared, "switchall", layout, *keys), tmp_path / "four")])
    one = config_of(prepared, "switchall", Layout(tied=True), *keys)
    run_ranks(train_runs, 1, [(one, tmp_path / "one")])
    for name in ("one", "four"):
        assert main(["convert", str(tmp_path / name), "--to", str(tmp_path / f"out-{name}")]) == 0
    ours, theirs = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("four", "one"))
    assert ours.keys() == theirs.keys() and "head.weight" not in ours
    assert all(gradient_error(ours[name], value) < 1e-3 for name, value in theirs.items())


def test_nothing_is_written_among_the_checkpoints_of_a_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder there would pass for the newest checkpoint, or go with one that the run removes."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    before = sorted(run.rglob("*"))
    newest = list_checkpoints(run / "checkpoints")[-1]
    for out in (newest, newest / "deep" / "er", newest.with_name("step-99999999")):
        assert main(["convert", str(run), "--to", str(out)]) == 2
        assert capsys.readouterr().err.startswith("error: --to: ")
        assert export([str(run), "--to", str(out)]) == 2
        assert capsys.readouterr().err.startswith("error: --to: ")
        assert analyze([str(run), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith("error: --out: ")
        assert compare([str(run), "--out", str(out)]) == 2
        assert "error: --out: " in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    copy = tmp_path / "checkpoints" / "step-00000001"  # of no run: a user may call a folder so
    assert main(["convert", str(run), "--to", str(copy)]) == 0 and (copy / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["list", "{0}/nowhere"], "error: RUN_DIR: there is no folder {0}/nowhere"),
        (["list", "{0}"], "holds no checkpoints"),
        (["verify", "{0}"], "{0} holds no checkpoints; name a checkpoint (step-...) or a run folder"),
        (["verify", "{0}/nowhere"], "error: PATH: there is no folder {0}/nowhere"),
        (["convert", "{0}/nowhere", "--to={0}/out"], "error: PATH: there is no folder {0}/nowhere"),
        (["convert", "{0}/nowhere", "{0}/out"], "error: PATH: there is no folder {0}/nowhere"),  # as it was written
        (["convert", "{0}"], "error: --to: is missing; name the one folder to write to, --to DIR"),
        (["convert", "{0}", "{0}/one", "--to={0}/two"], "error: --to: is {0}/two, and {0}/one is another argument"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main([part.format(tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words.format(tmp_path) in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["list", "{0}"], ["verify", "{0}"], ["convert", "{0}", "{0}-out"]])
def test_an_export_is_told_how_it_becomes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "generation_config.json").touch()
    for line in (arguments, ["average", "{0}", "{0}", "--to", "{0}-out"]):
        assert main([part.format(folder) for part in line]) == 2
        said = capsys.readouterr().err
        assert f"{folder} is an export; make a checkpoint of it, python launch/import_weights.py {folder} --to" in said
        assert said.count("\n") == 1 and list(tmp_path.iterdir()) == [folder]
    (folder / "generation_config.json").unlink()
    (folder / "weights.json").touch()
    assert main([part.format(folder) for part in arguments]) == 2
    assert f"{folder} is what launch/checkpoint.py convert wrote for other programs; name" in capsys.readouterr().err
