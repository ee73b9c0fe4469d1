"""launch/checkpoint.py average: the mean of weights, of checkpoints of one model and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from data_prep.shards.format import Manifest
from model.language_model import build_model
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin, write_weights
from pretrain.cli.checkpoint import main
from pretrain.data.progress import Progress
from pretrain.saved_model import load_model
from tests.pretrain.refused import refused_without_torch
from tests.pretrain.runs import small_config
from tests.pretrain.saved import add_moving_average, rewrite_state, whole_tensors


def checkpoint(folder: Path, prepared: Path, step: int, *overrides: str, holds_tokenizer: bool = True) -> Path:
    """A checkpoint of random weights that are its own. `holds_tokenizer`: as none of a run does."""
    config, manifest = small_config(prepared, *overrides), Manifest.load(prepared)
    generator = torch.Generator().manual_seed(step)
    origin = WeightsOrigin(
        config=config,
        source="a test",
        tokenizer=StoredTokenizer.of(manifest) if holds_tokenizer else None,
        tokenizer_sha256=manifest.tokenizer.sha256,
        manifest_digest=manifest.digest,
        progress=Progress(step, 8 * step),
    )
    shapes = {name: p.shape for name, p in build_model(config.model, seed=0).named_parameters()}
    weights = {n: (lambda s=s: torch.randn(s, generator=generator)) for n, s in shapes.items()}
    return write_weights(folder / f"step-{step:08d}", origin, weights).path


@pytest.mark.parametrize("weights", [None, "2,0.5,1"])
def test_the_mean_is_that_of_numpy(
    weights: str | None, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What only training needs may differ.
    folders = [checkpoint(tmp_path, prepared, s, f"model.dropout={d}") for s, d in ((20, 0.0), (30, 0.1), (10, 0.2))]
    out = tmp_path / "mean"
    options = [] if weights is None else ["--weights", weights]
    assert main(["average", *map(str, folders), "--to", str(out), *options]) == 0
    said = capsys.readouterr().out
    parts = ("{}", "{}", "{}") if weights is None else ("{} x 0.5714", "{} x 0.1429", "{} x 0.2857")
    names = ", ".join(part.format(folder.name) for part, folder in zip(parts, folders, strict=True))
    assert said == f"{out}: mean of the weights of {names}\n"
    shares = np.array([1, 1, 1] if weights is None else [2, 0.5, 1], np.float64)
    tensors = [whole_tensors(folder) for folder in folders]
    for name, value in whole_tensors(out).items():
        stacked = np.stack([one[name].numpy().astype(np.float64) for one in tensors])
        expected = np.average(stacked, axis=0, weights=shares)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-7, atol=1e-9, err_msg=name)
    saved = load_model(out)
    assert saved.checkpoint.progress == Progress(30, 240) and saved.config.model.dropout == 0.1
    assert saved.tokenizer.vocab_size == 400


def test_the_mean_of_moving_averages_is_of_them_and_says_so(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [checkpoint(tmp_path, prepared, step) for step in (1, 2)]
    averages = [add_moving_average(folder, lambda value: value * 2 + 1) for folder in folders]
    both, alone = tmp_path / "both", tmp_path / "alone"
    names = ", ".join(folder.name for folder in folders)
    for out, given, said in (
        (both, folders, f"mean of the moving average of {names}"),
        (alone, folders[:1], f"moving average of {folders[0].name}"),
    ):
        assert main(["average", *map(str, given), "--to", str(out), "--ema"]) == 0
        assert capsys.readouterr().out == f"{out}: {said}\n"
        assert Checkpoint.open(out).state["weights_only"]["source"] == said
    for name, value in whole_tensors(both).items():
        key = name.removeprefix("master/")
        mean = (averages[0][key].double() + averages[1][key].double()) / 2
        np.testing.assert_allclose(value.numpy(), mean.numpy(), rtol=1e-7, atol=1e-9, err_msg=name)
        assert torch.equal(whole_tensors(alone)[name], averages[0][key])


def test_runs_of_one_name_and_one_step_are_told_apart(prepared: Path, tmp_path: Path) -> None:
    """And what is written names no place on this machine."""
    places = [tmp_path / name / "checkpoints" for name in ("a/own", "b/own", "b/other")]
    made = [checkpoint(tmp_path, prepared, step) for step in (1, 2)]
    folders = [Path(shutil.copytree(one, place / one.name)) for place in places for one in made]
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    out = tmp_path / "mean"
    given = [folders[0], folders[2], folders[3], places[2].parent, copy]
    assert main(["average", *map(str, given), "--to", str(out)]) == 0
    steps = [f"step-{step:08d}" for step in (1, 2)]
    names = [f"own (1) {steps[0]}", f"own (2) {steps[0]}", f"own (2) {steps[1]}", f"other {steps[1]}", "copy"]
    source = Checkpoint.open(out).state["weights_only"]["source"]
    assert source == "mean of the weights of " + ", ".join(names)


def test_a_mean_is_refused_before_torch_is_imported_and_files_are_read(prepared: Path, tmp_path: Path) -> None:
    folders = [str(checkpoint(tmp_path, prepared, step)) for step in (1, 2)]
    out, there = str(tmp_path / "out"), str(tmp_path)
    lines = [
        [*folders, "--to", out, "--weights", "1,-2"],
        [*folders, "--to", out, "--weights", "1,2,3"],
        [*folders, "--to", out, "--weights", "a," + "9" * 5000],
        [*folders, "--to", there],
        [folders[0], str(tmp_path / "gone"), "--to", out],
    ]
    assert refused_without_torch("pretrain.cli.checkpoint", [["average", *line] for line in lines]) == [2] * len(lines)


def test_the_mean_holds_the_tokenizer_of_the_data_where_no_checkpoint_does(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    folders = [checkpoint(tmp_path, data, step, holds_tokenizer=False) for step in (1, 2)]
    manifest = Manifest.load(data)
    out = tmp_path / "mean"
    assert main(["average", *map(str, folders), "--to", str(out)]) == 0
    shutil.rmtree(data)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    assert load_model(out).tokenizer.encode("The river is wide.") == peer.encode("The river is wide.")
    state = Checkpoint.open(out).state
    assert (state["tokenizer_sha256"], state["manifest_digest"]) == (manifest.tokenizer.sha256, manifest.digest)

    # Without the data the weights are averaged all the same, and the tokenizer is still known by its digest.
    again = tmp_path / "again"
    assert main(["average", *map(str, folders), "--to", str(again)]) == 0
    state = Checkpoint.open(again).state
    assert state["weights_only"]["tokenizer"] is None and state["tokenizer_sha256"] == manifest.tokenizer.sha256
    for name, value in whole_tensors(again).items():
        assert torch.equal(value, whole_tensors(out)[name])


def test_shares_whose_sum_no_float_holds_give_the_mean_all_the_same(prepared: Path, tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, prepared, step) for step in (1, 2)]
    for name, weights in (("large", "1e308,1e308"), ("equal", "1,1")):
        assert main(["average", *map(str, folders), "--to", str(tmp_path / name), "--weights", weights]) == 0
    large, equal = (whole_tensors(tmp_path / name) for name in ("large", "equal"))
    assert all(torch.equal(value, equal[name]) for name, value in large.items())
    assert any(value.abs().max() > 0 for value in large.values())


def test_a_mean_does_not_take_the_place_of_a_checkpoint_that_its_run_continues_from(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run" / "checkpoints"
    of_run = [shutil.copytree(checkpoint(tmp_path, prepared, s), place / f"step-{s:08d}") for s in (1, 2)]
    assert main(["average", *map(str, of_run), "--to", str(place / "step-00000003")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --to: {place / 'step-00000003'} would pass for a checkpoint of the run")
    assert error.count("\n") == 1 and sorted(place.iterdir()) == of_run
    assert main(["average", *map(str, of_run), "--to", str(place / "mean")]) == 0
    assert list_checkpoints(place) == of_run


def test_what_has_no_mean(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (checkpoint(tmp_path, prepared, step) for step in (1, 2))
    out = tmp_path / "out"

    def refused(words: str, *arguments: str | Path) -> None:
        assert main(["average", *map(str, arguments), "--to", str(out)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not out.exists() and not out.with_name("out.partial").exists()

    refused("the mean of one checkpoint is itself; name two or more", one)
    refused("--weights: 3 weights for 2 checkpoints", one, two, "--weights", "1,2,3")
    for weight in ("-1", "0", "inf", "nan"):
        refused(f"--weights: {weight} is no share", one, two, "--weights", f"1,{weight}")
    refused("--weights: 'a,b' are no numbers", one, two, "--weights", "a,b")
    rotated = checkpoint(tmp_path, prepared, 3, 'model.position={"type": "rope", "fraction": 0.25}')
    refused("model.position.fraction is 0.25, but 0.5 in ", one, two, rotated)
    wide = checkpoint(tmp_path, prepared, 4, "model.feedforward.expert_size=9")
    refused("model.feedforward.expert_size is 9, but 7 in", one, wide)
    refused("holds no moving average of the weights; leave --ema out", one, "--ema")
    refused("there is no folder", one, tmp_path / "gone")
    rewrite_state(two, lambda state: state.update(tokenizer_sha256="0" * 64))
    refused("was trained with another tokenizer than", one, two)
    shard = one / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused("rank-00000.safetensors does not match its sha256", one, wide.with_name(one.name))
