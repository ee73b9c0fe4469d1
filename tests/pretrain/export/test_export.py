"""launch/export.py: what it writes, that it comes back bit by bit, and what it refuses without leaving anything."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.paths import REPOSITORY
from model.language_model import LanguageModel
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint.weights import write_weights
from pretrain.cli.export import main
from pretrain.config.loading import parse_config
from pretrain.export import writing
from pretrain.export.folder import CODE
from pretrain.export.hf_config import hf_config, model_config
from pretrain.export.origin import without_places
from pretrain.export.reading import is_export, open_export
from pretrain.export.verify import compared_tokens, largest_difference, largest_size
from pretrain.export.weights import shards_of
from tests.pretrain.export.models import MODELS, TIED, checkpoint_of, config_of, model_of
from tests.pretrain.saved import rewrite_state

FILES = {
    "LICENSE",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
    *CODE,
}

LONG = {128: 384, 1365: 4095, 2048: 4096, 8192: 8192}
"""Tokens that --verify compares, by model.sequence_length, without memory."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of(TIED)


@pytest.fixture(scope="module")
def checkpoint(model: LanguageModel, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint_of(model, tmp_path_factory.mktemp("checkpoints") / "step-00000003", prepared)


def test_the_folder_is_complete(
    checkpoint: Checkpoint, model: LanguageModel, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "mine"
    assert main([str(checkpoint.path), "--to", str(out), "--license", "cc-by-4.0"]) == 0
    assert {path.name for path in out.iterdir()} == FILES and [path.name for path in out.parent.iterdir()] == ["mine"]
    assert f"{out}: step 3, 88,116 bytes of weights, 12 files" in capsys.readouterr().out
    assert (out / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")
    weights = load_file(out / "model.safetensors")
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys() and "head.weight" not in weights  # tied
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name in CODE:
        assert (out / name).read_bytes() == (REPOSITORY / "pretrain" / "export" / name).read_bytes()
    assert (out / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    places = [text for path in out.iterdir() if path.suffix in (".json", ".md") for text in [path.read_text()]]
    assert not any(str(tmp_path) in text or str(prepared.parent) in text for text in places), "a path of this machine"


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_comes_back(name: str) -> None:
    model = config_of(name)
    text = json.dumps(hf_config(model, dtype="float32", special={}))
    assert model_config(text, "config.json") == model


def test_the_round_trip_is_bit_equal(
    checkpoint: Checkpoint, model: LanguageModel, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    assert not is_export(tmp_path)
    assert main([str(checkpoint.path), "--to", str(out), "--max-shard-size", "30000"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert set(index["weight_map"].values()) == set(shards) and index["metadata"]["total_size"] == 88116
    assert is_export(out)
    exported = open_export(out)
    assert exported.config.model == model.config
    again = write_weights(tmp_path / "step-00000003", exported.weights_origin(), exported.tensors)
    same = ("progress", "loss", "validation_loss", "tokenizer_sha256", "manifest_digest", "parameters")
    assert [again.state[key] for key in same] == [checkpoint.state[key] for key in same]
    assert again.state["weights_only"]["tokenizer"] == checkpoint.state["weights_only"]["tokenizer"]
    first, second = (load_file(place / "rank-00000.safetensors") for place in (checkpoint.path, again.path))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_check_of_a_model_of_long_windows_keeps_few_logits() -> None:
    """At 8,192 tokens and 32,000 pieces three windows took four times 3 GB."""
    lengths = {size: compared_tokens(config_of(TIED).model_copy(update={"sequence_length": size})) for size in LONG}
    assert lengths == LONG
    with_memory = next(config_of(name) for name in MODELS if config_of(name).memory_length)
    assert compared_tokens(with_memory) == 3 * with_memory.sequence_length
    one, other = torch.randn(1, 700, 5), torch.randn(1, 700, 5)
    assert largest_difference(one, other) == float((one - other).abs().max())
    assert largest_size(one) == float(one.abs().max())
    one[0, 300, 2] = math.nan
    assert math.isnan(largest_difference(one, other))


def test_one_file_that_transformers_wrote_goes_before_an_index_that_it_left_behind(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from pretrain.export.modeling_switchall import SwitchAllForCausalLM

    out = tmp_path / "mine"
    assert main([str(checkpoint.path), "--to", str(out), "--max-shard-size", "30000"]) == 0
    model = SwitchAllForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.head.bias.fill_(0.5)
    model.save_pretrained(out)
    assert (out / "model.safetensors.index.json").exists() and not list(out.glob("model-*.safetensors"))
    assert open_export(out).tensors["head.bias"]().eq(0.5).all()


def test_transformers_loads_it_before_it_gets_its_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main([str(checkpoint.path), "--to", str(out), "--verify"]) == 0
    said = capsys.readouterr()
    assert "transformers gives the same ids, and logits that differ by at most" in said.out
    assert "comparing logits ...\n" in said.err, "of a billion parameters it takes a minute"
    shutil.rmtree(out)
    monkeypatch.setattr("pretrain.export.verify.TOLERANCE", -1.0)
    refused(checkpoint.path, out, "logits differ by", capsys, "--verify")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(checkpoint.path, out, "--verify: needs the package transformers; install it with `pip", capsys, "--verify")


def test_what_is_verified_reads_the_tokenizer_where_the_data_are_now(
    checkpoint: Checkpoint, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(checkpoint.path, tmp_path / "step-00000003")
    rewrite_state(place, lambda state: state["weights_only"].update(tokenizer=None))
    rewrite_state(place, lambda state: state["config"]["data"].update(manifest=str(tmp_path / "gone")))
    assert main([str(place), "--to", str(tmp_path / "mine"), "--data", str(prepared), "--verify"]) == 0
    assert "transformers gives the same ids" in capsys.readouterr().out


def test_half_precision_is_rounded_and_overflow_refused(
    checkpoint: Checkpoint, model: LanguageModel, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint.path), "--to", str(tmp_path / "half"), "--dtype", "bfloat16", "--verify"]) == 0
    assert "of the weights rounded alike; rounding itself moves them by up to" in capsys.readouterr().out
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(weights[name], p.bfloat16()) for name, p in model.named_parameters())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    large = model_of(TIED)
    with torch.no_grad():
        large.get_parameter("head.bias")[0] = 1e5
    place = checkpoint_of(large, tmp_path / "step-00000004", prepared).path
    refused(place, tmp_path / "out", "--dtype: head.bias has values that float16 has not", capsys, "--dtype=float16")
    with torch.no_grad():
        large.get_parameter("head.bias")[0] = torch.nan
    diverged = checkpoint_of(large, tmp_path / "step-00000005", prepared).path
    refused(diverged, tmp_path / "out", "step-00000005: its outputs are not finite, so it has", capsys, "--verify")


def refused(place: Path, out: Path, words: str, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    """One line, exit code 2, and beside what was there before nothing."""
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else []
    assert main([str(place), "--to", str(out), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error, error
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else []) == before


def test_foreign_files_are_left_alone_and_an_older_export_is_replaced(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(checkpoint.path, out, "holds notes.txt, which is not of an export; name another folder", capsys)
    (out / "notes.txt").unlink()
    assert main([str(checkpoint.path), "--to", str(out), "--max-shard-size", "30000"]) == 0
    assert main([str(checkpoint.path), "--to", str(out)]) == 0  # one file now
    assert {path.name for path in out.iterdir()} == FILES and list(tmp_path.iterdir()) == [out]
    (out / "adapter").mkdir()
    refused(checkpoint.path, out, "holds adapter", capsys)
    (tmp_path / "file").write_text("")
    refused(checkpoint.path, tmp_path / "file", "is a file and not a folder", capsys)


def test_a_mounted_disk_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As containers have them."""
    out = tmp_path / "output"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    refused(checkpoint.path, out, f"--to: {out} is where a disk is mounted, which no folder can replace", capsys)
    assert main([str(checkpoint.path), "--to", str(out / "mine")]) == 0


def test_the_folder_that_a_link_leads_to_is_replaced_and_the_link_stays(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one on a larger disk."""
    place, link = tmp_path / "disk" / "mine", tmp_path / "here" / "mine"
    for folder in (place, link.parent):
        folder.mkdir(parents=True)
    link.symlink_to(place)
    for _ in range(2):
        assert main([str(checkpoint.path), "--to", str(link)]) == 0
        assert link.is_symlink() and {path.name for path in place.iterdir()} == FILES
        assert list(link.parent.iterdir()) == [link] and list(place.parent.iterdir()) == [place]
    shutil.rmtree(place)
    refused(checkpoint.path, link, f"{link} is a link to {place}, which is not there; make that folder", capsys)


@pytest.mark.parametrize("is_there", [False, True])
def test_an_export_that_fails_leaves_what_was_there(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_there: bool,
) -> None:
    out = tmp_path / "mine"
    if is_there:
        assert main([str(checkpoint.path), "--to", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if is_there else None

    def fail_with(error: BaseException) -> Callable[..., Any]:
        def fail(*arguments: Any, **named: Any) -> None:
            raise error

        return fail

    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "mine.partial" / "README.md"))
    monkeypatch.setattr(writing, "card", fail_with(full))
    refused(checkpoint.path, out, "README.md cannot be written: the disk is full", capsys)
    monkeypatch.setattr(writing, "card", fail_with(KeyboardInterrupt()))
    assert main([str(checkpoint.path), "--to", str(out)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == (["mine"] if is_there else [])
    assert before == ({path.name: path.read_bytes() for path in out.iterdir()} if is_there else None)
    # A process that was killed leaves a folder that no program takes for an export, and the next export takes it away.
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "model.safetensors").write_bytes(b"half")
    monkeypatch.undo()
    assert main([str(checkpoint.path), "--to", str(out)]) == 0 and [path.name for path in tmp_path.iterdir()] == [
        "mine"
    ]
    monkeypatch.setattr(writing, "free_bytes", lambda folder: 1000)
    refused(checkpoint.path, out, "has no room for the export", capsys)


def test_other_refusals(
    checkpoint: Checkpoint, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "mine"
    place = shutil.copytree(checkpoint.path, tmp_path / "step-00000003")
    refused(place, out, "--license: 'My Own' is no licence", capsys, "--license", "My Own")
    refused(place, out, "--max-shard-size: '5 apples' is no size", capsys, "--max-shard-size", "5 apples")
    for size in ("9" * 5000, "9" * 5000 + "GB"):  # Python's int raises above 4,300 digits
        refused(place, out, "(5,00", capsys, "--max-shard-size", size)
    refused(tmp_path / "nothing", out, "RUN: ", capsys)
    content = (place / "tokenizer.model").read_bytes()
    (place / "tokenizer.model").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(place, out, "is not the tokenizer that its data set names", capsys)
    (place / "tokenizer.model").write_bytes(content)
    rewrite_state(place, lambda state: state["weights_only"]["tokenizer"]["entry"].update(vocab_size=500))
    refused(place, out, "model.vocab_size: is 403, but the tokenizer has 500 pieces", capsys)
    rewrite_state(place, lambda state: state["weights_only"].update(tokenizer=None))
    rewrite_state(place, lambda state: state["config"]["data"].update(manifest=str(tmp_path / "gone")))
    refused(place, out, "no tokenizer: data.manifest: there is no", capsys)
    assert main([str(place), "--to", str(out), "--data", str(prepared)]) == 0
    shutil.rmtree(out.parent)
    shard = place / "rank-00000.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    refused(place, out, "rank-00000.safetensors does not match its sha256", capsys, "--data", str(prepared))


def test_places_of_the_machine_are_left_out() -> None:
    tree = {
        "model": config_of("dense").model_dump(mode="json"),
        "description": "of /home/me",
        "data": {
            "cache_dir": "/scratch/me",
            "sources": [_source("/home/me/c4/manifest.json"), _source("s3://key@bucket/pes2o")],
        },
        "evaluate": {"tasks": {"lambada": "~/raw/lambada", "blimp": "raw/blimp"}},
        "checkpoint": {"resume": "/home/me/runs/one"},
        "monitor": {"alert_command": "python launch/webhook.py --url-file /home/me/.webhook"},
    }
    left = without_places(parse_config(tree))
    assert [source["manifest"] for source in left["data"]["sources"]] == ["c4", "pes2o"]
    assert left["evaluate"]["tasks"] == {"lambada": "lambada", "blimp": "raw/blimp"}
    assert left["data"]["cache_dir"] is None and left["monitor"]["alert_command"] is None
    assert (left["checkpoint"]["resume"], left["description"]) == ("auto", "of /home/me")
    assert left["data"]["manifest"] == "data/sample/manifest.json" and parse_config(left).model == config_of("dense")


def _source(manifest: str) -> dict[str, Any]:
    return {"manifest": manifest, "weight": 1.0}


def test_what_cannot_be_read_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert main([str(checkpoint.path), "--to", str(out)]) == 0

    def unreadable(change: Callable[[Path], object], words: str) -> None:
        copy = shutil.copytree(out, tmp_path / "copy")
        change(copy)
        with pytest.raises(UserError, match=words) as error:
            open_export(copy)
        assert "\n" not in str(error.value)
        shutil.rmtree(copy)

    def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
        def rewrite(folder: Path) -> None:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors")

        return rewrite

    def with_values(name: str, **values: Any) -> Callable[[Path], None]:
        def rewrite(folder: Path) -> None:
            tree = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**tree, **values}))

        return rewrite

    def with_config(**values: Any) -> Callable[[Path], None]:
        return with_values("config.json", **values)

    unreadable(lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'), "config.json is no text in UTF-8")
    unreadable(with_config(model_type="llama"), "model_type is 'llama', not 'switchall'")
    unreadable(with_config(attention={"type": "dense", "num_heads": 0}), "config.json: .*num_heads")
    unreadable(with_config(hidden_size=24), r"is F32 \[.*\], the model's is \[.*\]; config.json and weights differ")
    unreadable(with_config(vocab_size=300), "the tokenizer has 400 pieces, the model 300")
    unreadable(with_weights(lambda w: w.pop("head.bias")), "its weights have no head.bias")
    unreadable(with_weights(lambda w: w.update(other=torch.ones(1))), "has other, which this model has not")
    unreadable(lambda f: (f / "config.json").unlink(), "config.json cannot be read: No such file")
    unreadable(lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "model.safetensors cannot be read")
    unreadable(lambda f: (f / "tokenizer.model").write_bytes(b"other"), "is not the tokenizer of this model")
    unreadable(lambda f: (f / "training.json").write_text("[]"), "training.json is not of an export")
    known = json.loads((out / "training.json").read_text())
    source = {"name": "a", "digest": "", "weight": 1}
    for values in (
        {"step": None},
        {"sequences": math.inf},
        {"loss": "low"},
        {"data_digest": 1},
        {"tokens": []},
        {"stages": 1.5},
        {"stages": [{"first": 0, "sources": [{"name": "a", "weight": 1}]}]},
        {"stages": [{"first": 0, "sources": [{**source, "weight": "much"}]}]},
        {"config": []},
        {"config": {**known["config"], "model": 7}},
        {"tokenizer": "a"},
        {"tokenizer": {"kind": "ids"}},
    ):
        unreadable(with_values("training.json", **values), "training.json is not of an export")
    for values in ({"kind": {}}, {"kind": "bytes"}, {"sentences": []}, {"eos_token": 1}):
        unreadable(with_values("tokenizer_config.json", **values), "tokenizer_config.json is not of an export")

    too_deep = "[" * 100_000  # for Python's reader of JSON
    unreadable(
        lambda f: (f / "tokenizer_config.json").write_text(too_deep), "tokenizer_config.json is not of an export"
    )

    def with_an_index_that_escapes(folder: Path) -> None:
        index = (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": {"a": "../a"}}))

    unreadable(with_an_index_that_escapes, "is no index of weights")
    (out / "training.json").unlink()  # as after transformers' save_pretrained
    unreadable(lambda f: (f / "config.json").write_text(too_deep), "config.json is not JSON")
    assert open_export(out).weights_origin().progress.step == 0


def test_shards() -> None:
    shapes = {"a": [10], "b": [5, 2], "c": [100], "d": [1], "e": [19]}
    assert shards_of(shapes, 2, 40) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards_of(shapes, 2, 10**9) == [list(shapes)]
