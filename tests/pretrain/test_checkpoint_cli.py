"""launch/checkpoint.py: what people see of a run's checkpoints, and the weights they take away."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain.checkpoint.state
from pretrain.checkpoint import list_checkpoints
from pretrain.checkpoint_cli import main
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import gradient_error, small_config
from tests.pretrain.saved import rewrite_state, whole_tensors
from tests.pretrain.test_checkpoint import metrics, train_runs


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
    shutil.copytree(place / "step-00000004", place / "step-00000007")
    rewrite_state(place / "step-00000007", lambda state: state.update(format_version=1))
    os.truncate(place / "step-00000004" / "rank-00001.safetensors", 9)
    assert main(["list", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "saved", "bytes", "layout", "state", "loss", "validation"]
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    validation = next(e["loss"] for e in events if e["event"] == "validation" and e["step"] == 2)
    size = sum(
        f.stat().st_size for f in (place / "step-00000002").iterdir() if f.name not in ("state.json", "commit.json")
    )
    words = lines[1].split()
    assert words[0] == "step-00000002" and words[1].startswith("20") and words[3] == f"{size:,}"
    assert words[4:10] == ["TP1", "PP1", "DP2", "EP1", "ZeRO-3", "whole"]
    assert words[10:] == [f"{metrics(copy)[1]['loss']:.4f}", f"{validation:.4f}"]
    assert "damaged: rank-00001.safetensors is 9 bytes, not" in lines[2]
    assert "is of format 1, this version reads 2" in lines[3]
    assert lines[4].startswith("step-00000006.partial") and "partial: being written, or left by" in lines[4]
    assert lines[5].startswith("superseded-1-step-00000004") and " whole " in lines[5]
    assert len(lines) == 6


def test_verify(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.count("whole, every sha256 matches") == 2
    newest = copy / "checkpoints" / "step-00000004"
    content = bytearray((newest / "rank-00000.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "rank-00000.safetensors").write_bytes(content)
    assert main(["verify", str(copy)]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step-00000002: whole")
    assert out[1] == "step-00000004: DAMAGED: rank-00000.safetensors does not match its sha256"
    assert main(["verify", str(newest)]) == 2
    assert main(["verify", str(newest.with_name("step-00000002"))]) == 0


def test_convert(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert main(["convert", str(run_dir), str(tmp_path / "out")]) == 0
    assert "of step 4" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = whole_tensors(newest, prefixes=("master/",))
    assert {f"master/{name}" for name in found} == expected.keys()
    assert all(torch.equal(value, expected[f"master/{name}"]) for name, value in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["d_model"] == 24
    assert main(["convert", str(run_dir), str(tmp_path / "out")]) == 2
    assert "exists; name another folder" in capsys.readouterr().err
    assert main(["convert", str(newest.with_name("step-00000002")), str(tmp_path / "other")]) == 0


def test_convert_holds_one_parameter_at_a_time(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = [], pretrain.checkpoint.state.read

    def noted(reader, checkpoint, state):  # type: ignore[no-untyped-def]
        asked.append(list(state))
        read(reader, checkpoint, state)

    monkeypatch.setattr(pretrain.checkpoint.state, "read", noted)
    assert main(["convert", str(run_dir), str(tmp_path / "out")]) == 0
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
        assert main(["convert", str(tmp_path / name), str(tmp_path / f"out-{name}")]) == 0
    ours, theirs = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("four", "one"))
    assert ours.keys() == theirs.keys() and "head.weight" not in ours
    assert all(gradient_error(ours[name], value) < 1e-3 for name, value in theirs.items())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["list", "{0}/nowhere"], "there is no folder"),
        (["list", "{0}"], "holds no checkpoints"),
        (["verify", "{0}/nowhere"], "there is no checkpoint folder"),
        (["convert", "{0}/nowhere", "{0}/out"], "there is no checkpoint folder"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main([part.format(tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and not list(tmp_path.iterdir())
