"""Checkpoints of weights alone: read like any other, whole or not there, and begun with instead of continued."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import pretrain.checkpoint.initial
import pretrain.checkpoint.loading
import pretrain.data.patience
from common.errors import UserError
from data_prep.shards.format import Manifest
from model.language_model import build_model
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.checkpoint.folder import DamagedCheckpoint
from pretrain.checkpoint.initial import initial_checkpoint
from pretrain.checkpoint.shapes import check_shapes, full_shapes
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin, write_weights
from pretrain.cli.checkpoint import main
from pretrain.config.schema import Config
from pretrain.data.patience import Patience
from pretrain.data.sources import Sources
from pretrain.parallel.agreement import PeerFailed
from pretrain.resume import changed_settings
from pretrain.saved_model import load_model
from tests.harness import RankFailed, run_ranks
from tests.pretrain.runs import events, small_config, train_runs, trainer_of
from tests.pretrain.saved import rewrite_state, whole_tensors

TIED = "model.tied_embedding=true"


def parameters(prepared: Path, seed: int = 3) -> dict[str, Tensor]:
    """Of the small model: random, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    names = dict(build_model(small_config(prepared, TIED).model, seed=0).named_parameters())
    return {name: torch.randn(p.shape, generator=generator) / 8 for name, p in names.items()}


def written(folder: Path, prepared: Path, weights: dict[str, Tensor]) -> Checkpoint:
    origin = WeightsOrigin(
        config=small_config(prepared, TIED, "data.manifest=nowhere"),
        source="a test",
        tokenizer=StoredTokenizer.of(Manifest.load(prepared)),
    )
    return write_weights(folder, origin, {name: value.detach for name, value in weights.items()})


def test_they_are_read_like_any_other(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = parameters(prepared)
    place = tmp_path / "run" / "checkpoints" / "step-00000000"
    written(place, prepared, weights)
    saved = load_model(place)  # the data are nowhere; the tokenizer lies inside
    plain = build_model(saved.config.model, seed=1).eval()
    plain.load_state_dict(weights | {"head.weight": weights["embedding.weight"]})
    tokens = torch.arange(32).view(2, 16)
    assert torch.allclose(saved.model.logits(tokens)[0], plain.logits(tokens)[0], atol=1e-5)
    assert saved.tokenizer.decode(saved.tokenizer.encode("Two words.")) == "Two words."
    assert main(["verify", str(place)]) == 0 and main(["list", str(place.parent)]) == 0
    out = capsys.readouterr().out
    assert "whole, every sha256 matches" in out and "weights alone" in out
    mean = place.rename(tmp_path / "mean")  # as `average` and an import are called by who writes them
    assert main(["list", str(mean)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "mean"
    assert main(["convert", str(mean), str(tmp_path / "out")]) == 0
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == weights.keys() and all(torch.equal(converted[n], weights[n]) for n in weights)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()


def test_what_does_not_fit_leaves_nothing(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, place = parameters(prepared), tmp_path / "out"

    def refused(change: Callable[[], dict[str, Tensor]], words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            written(place, prepared, change())
        assert "\n" not in str(error.value)

    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    (other / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"other/tokenizer\.model is not the tokenizer that its data set names"):
        written(place, other, weights)
    shutil.rmtree(other)
    lacking = {name: value for name, value in weights.items() if name != "head.bias"}
    refused(lambda: lacking, "head.bias: the model has this parameter, a test has not")
    refused(lambda: weights | {"head.weight": torch.zeros(1)}, "head.weight: a test has this parameter, the model has")
    refused(lambda: weights | {"head.bias": torch.zeros(7)}, r"head.bias: has shape \[7\] in a test, .* \[400\]")
    assert list(tmp_path.iterdir()) == []

    def full(*args: object, **named: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "tensors.json")

    with monkeypatch.context() as patched:
        patched.setattr("pretrain.checkpoint.weights.commit", full)
        refused(lambda: weights, "--to: tensors.json: No space left on device")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    refused(lambda: weights, "out.partial is in the way; move it")
    (tmp_path / "out.partial" / "mine").rename(tmp_path / "out.partial" / "state.json")  # as a killed attempt leaves it
    written(place, prepared, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    refused(lambda: weights, "--to: .*out exists; name a folder that does not")


def test_parameters_that_are_missing_or_of_another_shape_are_counted_and_the_first_is_named(prepared: Path) -> None:
    config = small_config(prepared, TIED).model
    shapes = {name: list(value.shape) for name, value in parameters(prepared).items()}
    first, second, third = list(full_shapes(config))[:3]
    assert full_shapes(config) == shapes
    check_shapes(Checkpoint(Path("x"), {"parameters": shapes | {"another": [1]}}), config, "key")
    for saved, words in (
        ({first: None}, "missing there; give"),
        ({first: [1]}, "[1] there; give"),
        ({first: None, third: [1]}, "missing there (and 1 more parameter); give"),
        ({first: [1], second: [1], third: None}, "[1] there (and 2 more parameters); give"),
    ):
        with pytest.raises(UserError) as refused:
            check_shapes(Checkpoint(Path("x"), {"parameters": shapes | saved}), config, "key")
        assert f"key: x is of another model: {first} is {shapes[first]} here and {words}" in str(refused.value)


def begun(rank: int, config: Config) -> dict[str, Tensor]:
    """The weights that a rank begins with, where the second one looks before the newest checkpoint is there."""
    if rank == 1:
        pretrain.checkpoint.initial.newest_of = lambda checkpoints: checkpoints[0]
    trainer = trainer_of(config)
    weights = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    trainer.engine.destroy()
    return weights


def test_all_ranks_begin_with_one_checkpoint_of_a_run_that_goes_on(prepared: Path, tmp_path: Path) -> None:
    """Each reads a part of it for the others: no message would tell of a model of two."""
    newest = parameters(prepared, seed=4)
    written(tmp_path / "run" / "step-00000001", prepared, parameters(prepared))
    written(tmp_path / "run" / "step-00000002", prepared, newest)
    config = small_config(prepared, f"train.init_from={tmp_path / 'run'}", "parallel.zero=0", TIED)
    for weights in run_ranks(begun, 2, config):
        assert all(torch.equal(weights[name], value) for name, value in newest.items())
    file = tmp_path / "run" / "step-00000002" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    words = r"init_from: checkpoint \S+step-00000002: rank-00000\.safetensors does not match its sha256; name another"
    with pytest.raises(RankFailed, match=words):
        run_ranks(begun, 2, config)


def first_lines(config: Config, run: Path) -> list[str]:
    """What the first steps of a start print of its initial weights; no checkpoint outlives it."""
    run_ranks(train_runs, 1, [(config, run)])
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    return [event["checkpoint"] for event in events(run, "initial_weights")]


def test_a_second_first_start_begins_with_the_same_weights_of_a_run_that_goes_on(
    prepared: Path, tmp_path: Path
) -> None:
    """One that was killed before its first checkpoint. Where they are gone, or others are named, with the newest."""
    live, run, other = tmp_path / "live", tmp_path / "run", tmp_path / "other"
    weights = written(tmp_path / "weights", prepared, parameters(prepared)).path
    for folder in (live, other):  # copies: no checkpoint of weights alone is written into a run
        shutil.copytree(weights, folder / "checkpoints" / "step-00000001")
    keys = ("train.steps=1", "evaluate.sequences=0", "parallel.zero=0", TIED)
    config = small_config(prepared, f"train.init_from={live}", *keys)
    first, second = (live / "checkpoints" / f"step-0000000{number}" for number in (1, 2))
    assert first_lines(config, run) == [str(first)]
    shutil.copytree(weights, second)
    assert first_lines(config, run) == [str(first)] * 2
    known = Sources.load(config).tokenizer.sha256
    checked = initial_checkpoint(config, known, run_dir=run)
    assert checked is not None and checked.path == first
    elsewhere = small_config(prepared, f"train.init_from={other}", *keys)
    assert first_lines(elsewhere, run)[2:] == [str(other / "checkpoints" / "step-00000001")]
    shutil.rmtree(first)
    assert first_lines(config, run)[3:] == [str(second)]


def test_initial_weights_that_are_removed_between_the_list_and_the_read_are_looked_for_again(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the other run, which goes on. One that is there and damaged stays a refusal."""
    live, weights = tmp_path / "live", written(tmp_path / "weights", prepared, parameters(prepared)).path
    kept, removed = (live / "checkpoints" / f"step-0000000{number}" for number in (2, 1))
    shutil.copytree(weights, removed)
    newest_of = pretrain.checkpoint.initial.newest_of

    def overtaken(found: Sequence[Path]) -> Path:
        newest = newest_of(found)
        if newest == removed:
            shutil.copytree(weights, kept)
            shutil.rmtree(removed)
        return newest

    monkeypatch.setattr(pretrain.checkpoint.initial, "newest_of", overtaken)
    config = small_config(prepared, f"train.init_from={live}", "parallel.zero=0", TIED)
    known = Sources.load(config).tokenizer.sha256
    checked = initial_checkpoint(config, known)
    assert checked is not None and checked.path == kept
    (kept / "state.json").write_text("")
    with pytest.raises(DamagedCheckpoint):
        initial_checkpoint(config, known)


def refused_where_removed(rank: int, config: Config, removed: Path, before: str) -> tuple[str, str, str]:
    """What a rank raises whose initial weights are removed `before` it opens, or reads them, after they were found."""
    module, name = {"opening": (Checkpoint, "open"), "reading": (pretrain.checkpoint.loading, "load_weights")}[before]
    function = getattr(module, name)

    def late(*arguments: Any, **named: Any) -> Any:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(removed)
        dist.barrier()
        return function(*arguments, **named)

    setattr(module, name, late)  # this process ends with the test
    try:
        trainer_of(config)
    except PeerFailed as error:
        return "peer failed", error.kind.__name__, error.words
    except UserError as error:
        return "raised", type(error).__name__, str(error)
    raise AssertionError("the weights are not there")


@pytest.mark.parametrize("before", ["opening", "reading"])
def test_a_start_whose_initial_weights_are_removed_under_it_says_so_once_and_may_begin_again(
    prepared: Path, tmp_path: Path, before: str
) -> None:
    """Of a run that goes on the next start finds others. Where none are left, none will be."""
    live, weights = tmp_path / "live", written(tmp_path / "weights", prepared, parameters(prepared)).path
    kept, removed = (live / "checkpoints" / f"step-0000000{number}" for number in (1, 2))
    for path in (kept, removed):
        shutil.copytree(weights, path)
    config = small_config(prepared, f"train.init_from={live}", "parallel.zero=0", TIED)
    first, second = run_ranks(refused_where_removed, 2, config, removed, before)
    said = (
        f"train.init_from: {removed} was removed before it was read, as by a run that goes on (checkpoint.keep_last); "
        f"start again: the run then begins with {kept}"
    )
    assert first == ("raised", "PassingError", said)
    assert second == ("peer failed", "PassingError", f"rank 0: {said}")
    shutil.copytree(weights, removed)
    named = config.replaced("train", init_from=str(removed))
    for how, kind, words in run_ranks(refused_where_removed, 2, named, removed, before):
        assert kind == "UserError" and f"train.init_from: there is no folder {removed}; name a" in words, how


def begun_late(rank: int, config: Config, folder: Path) -> dict[str, int]:
    """How often each kind of read of what lies in `folder` may still fail, after a start."""
    pretrain.data.patience.FIRST_PAUSE_SECONDS = 0.0  # this process ends with the test
    left = dict.fromkeys(("iterdir", "read_bytes", "stat", "open"), 2)

    def failing(name: str) -> Callable[..., Any]:
        function = getattr(Path, name)

        def call(path: Path, *arguments: Any, **named: Any) -> Any:
            if folder in (path, *path.parents) and left[name]:
                left[name] -= 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return function(path, *arguments, **named)

        return call

    for name in left:
        setattr(Path, name, failing(name))
    known = Sources.load(config).tokenizer.sha256
    initial_checkpoint(config, known, patience=Patience(60.0))  # as a check before the start
    assert not left["iterdir"] and not left["stat"]
    left.update(dict.fromkeys(left, 2))
    trainer_of(config).engine.destroy()
    return left


def test_initial_weights_are_waited_for(prepared: Path, tmp_path: Path) -> None:
    """As what a run goes on from: a server that fails over for some seconds ends no start."""
    written(tmp_path / "run" / "step-00000001", prepared, parameters(prepared))
    config = small_config(prepared, f"train.init_from={tmp_path / 'run'}", "parallel.zero=0", TIED)
    assert run_ranks(begun_late, 1, config, tmp_path / "run") == [
        dict.fromkeys(("iterdir", "read_bytes", "stat", "open"), 0)
    ]


def test_a_run_begins_with_them_and_continues_from_its_own(prepared: Path, tmp_path: Path) -> None:
    weights, place = parameters(prepared), tmp_path / "weights"
    checkpoint = written(place, prepared, weights)
    rate = "optimizer.learning_rate=1e-30"  # the weights stay as they are
    keys = ("train.steps=2", "evaluate.sequences=0", f"train.init_from={place}", "parallel.zero=2", TIED, rate)
    config = small_config(prepared, *keys, "model.dropout=0.1")
    with pytest.raises(UserError, match=r"weights alone \(a test\).*--set train.init_from="):
        changed_settings(config, checkpoint, Sources.load(config).digest)
    run = tmp_path / "run"
    run_ranks(train_runs, 2, [(config, run)])
    end = run / "checkpoints" / "step-00000002"
    tensors = whole_tensors(end, prefixes=("master/", "exp_avg/"))
    assert all(torch.equal(tensors[f"master/{name}"], value) for name, value in weights.items())
    assert any(bool(tensors[f"exp_avg/{name}"].any()) for name in weights)
    state = json.loads((end / "state.json").read_text())
    assert (state["progress"]["step"], state["optimizer_steps"]) == (2, 2)
    begun = [(event["path"], event["checkpoint"]) for event in events(run, "initial_weights")]
    assert begun == [(str(place), str(place))]

    def refused(words: str, where: str, digest: str | None, *more: str) -> None:
        with pytest.raises(UserError, match=words):
            initial_checkpoint(small_config(prepared, f"train.init_from={where}", *more), digest)

    refused("train.init_from: there is no folder .*gone", str(tmp_path / "gone"), None)
    refused("is no checkpoint and holds none", str(tmp_path), None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "generation_config.json").touch()
    refused("mine is an export; make a checkpoint of it, python launch/import_weights.py", str(tmp_path / "mine"), None)
    refused("train.init_from: .* trained with another tokenizer", str(place), "0" * 64)
    own = state["tokenizer_sha256"]
    refused(r"of another model: head.weight is \[400, 24\] here and missing there; give", str(run), own)
    other = r"embedding.weight is \[400, 12\] here and \[400, 24\] there \(and \d+ more parameters\); give the model"
    refused(other, str(run), own, TIED, "model.d_model=12")
    found = initial_checkpoint(small_config(prepared, f"train.init_from={run}", TIED), own)
    assert found is not None and found.path == end
    shutil.copytree(place, tmp_path / "unknown")
    unknown = {"weights_only": {"source": "a test", "tokenizer": None}, "tokenizer_sha256": None}
    rewrite_state(tmp_path / "unknown", lambda s: s.update(unknown))
    assert initial_checkpoint(small_config(prepared, f"train.init_from={tmp_path / 'unknown'}", TIED), "0" * 64)
    shutil.copytree(end, tmp_path / "bytes")
    rewrite_state(tmp_path / "bytes", lambda s: s.update(tokenizer_sha256=None))  # a run's, whose ids were bytes
    refused("train.init_from: .* trained with another tokenizer", str(tmp_path / "bytes"), own, TIED)
