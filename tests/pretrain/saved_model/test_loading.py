"""A model, its tokenizer and configuration, from checkpoints of one rank and of several, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import PassingError, UserError
from data_prep.shards.format import Manifest, manifest_digest
from data_prep.stages.tokenizer import TextTokenizer
from model.language_model import build_model
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint import loading as checkpoint_loading
from pretrain.checkpoint.convert import convert
from pretrain.checkpoint.folder import while_they_are_there
from pretrain.export.hf_config import model_config
from pretrain.export.loading import load_any
from pretrain.export.reading import open_export
from pretrain.generation.pieces import TextStream
from pretrain.gpus import usable_device
from pretrain.parallel.agreement import PeerFailed
from pretrain.report.run_paths import SWEEP_RECORD
from pretrain.saved_model import Tokenizer, find_checkpoint, load_model, loading
from pretrain.saved_model.loading import find_tokenizer
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs
from tests.pretrain.saved import rewrite_state, whole_tensors

TEXT = "Two words.\nThird word, and more"
STEPS = ("train.steps=2", "checkpoint.every_steps=1", "evaluate.sequences=0")
TENSOR = ("parallel.tensor=2", "model.feedforward.num_experts=6")


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two tensor-parallel ranks, with an embedding that the output layer uses too."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    config = small_config(prepared, *STEPS, *TENSOR, "model.tied_embedding=true")
    run_ranks(train_runs, 2, [(config, folder)])
    return folder


def test_a_model_of_two_ranks(run: Path, prepared: Path) -> None:
    saved = load_model(run)
    assert saved.checkpoint.path.name == "step-00000002" and saved.checkpoint.progress.step == 2
    assert not saved.model.training and not any(p.requires_grad for p in saved.model.parameters())
    tensors = whole_tensors(saved.checkpoint.path, prefixes=("master/",))
    weights = {name.removeprefix("master/"): tensor for name, tensor in tensors.items()}
    weights["head.weight"] = weights["embedding.weight"]
    plain = build_model(saved.config.model, seed=0).eval()
    plain.load_state_dict(weights)
    tokens = torch.arange(32).view(2, 16)
    assert torch.allclose(saved.model.logits(tokens)[0], plain.logits(tokens)[0], atol=1e-5)
    ids = saved.tokenizer.encode(TEXT)
    reference = TextTokenizer.load(prepared / "tokenizer.model")
    assert ids == reference.encode(TEXT).tolist() and saved.tokenizer.decode(ids) == TEXT
    assert "".join(saved.tokenizer.pieces(ids)).lstrip() == TEXT
    assert (saved.tokenizer.vocab_size, saved.tokenizer.eos_id) == (400, reference.eos_id)


def test_what_is_named_is_opened(run: Path) -> None:
    first = run / "checkpoints" / "step-00000001"
    assert find_checkpoint(first).progress.step == 1
    assert find_checkpoint(run / "checkpoints").progress.step == find_checkpoint(run).progress.step == 2


def test_data_that_moved(run: Path, prepared: Path, tmp_path: Path) -> None:
    def forget(state: dict[str, object]) -> None:
        state["config"]["data"]["manifest"] = str(tmp_path / "gone")  # type: ignore[index]

    moved = shutil.copytree(run, tmp_path / "run")
    rewrite_state(moved / "checkpoints" / "step-00000002", forget)
    with pytest.raises(UserError, match=r"no tokenizer: data.manifest: there is no .*gone.*--data"):
        load_model(moved)
    assert load_model(moved, data=[tmp_path / "nowhere", prepared]).tokenizer.vocab_size == 400


def test_data_that_were_made_anew_have_the_tokenizer_of_a_run_if_it_is_the_same(run: Path, tmp_path: Path) -> None:
    """As after an upgrade: another version of the preparation gives another digest, not another tokenizer."""

    def change(**entries: str) -> Path:
        moved = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
        rewrite_state(moved / "checkpoints" / "step-00000002", lambda state: state.update(entries))
        return moved

    saved = load_model(change(manifest_digest="0" * 64))
    assert saved.tokenizer.decode(saved.tokenizer.encode(TEXT)) == TEXT
    assert find_tokenizer(saved.checkpoint, [])[1] is None, "they are not the data that the run read"
    with pytest.raises(UserError, match=r"no tokenizer: .* is not the data set that the run read \(another digest\)"):
        load_model(change(manifest_digest="0" * 64, tokenizer_sha256="0" * 64))


def test_data_that_use_the_same_file_in_another_way_have_another_tokenizer(
    run: Path, prepared: Path, tmp_path: Path
) -> None:
    """With it no text would end, or be of other pieces. A checkpoint of an older version does not say how it was."""
    moved, path = shutil.copytree(run, tmp_path / "run"), tmp_path / "anew" / "manifest.json"
    newest = moved / "checkpoints" / "step-00000002"
    shutil.copytree(prepared, path.parent)
    manifest = json.loads(path.read_text())

    def change(state: dict[str, Any]) -> None:
        state["config"]["data"]["manifest"], state["manifest_digest"] = str(path), "0" * 64

    rewrite_state(newest, change)
    eos = load_model(moved).tokenizer.eos_id
    assert eos is not None
    provenance = manifest["provenance"]
    settings = provenance["config"] | {"tokenizer": provenance["config"]["tokenizer"] | {"sentences": "lines"}}
    text_ends_documents = {"tokenizer": manifest["tokenizer"] | {"eos_id": None}}
    lines_are_encoded_one_by_one = {"provenance": provenance | {"config": settings}}
    for changed in (text_ends_documents, lines_are_encoded_one_by_one):
        body = manifest | changed
        path.write_text(json.dumps(body | {"digest": manifest_digest(body)}))
        with pytest.raises(UserError, match=r"no tokenizer: .* is not the data set that the run read"):
            load_model(moved)
    rewrite_state(newest, lambda state: state.pop("tokenizer_use"))
    assert load_model(moved).tokenizer.eos_id == eos, "of the last ones"


def test_refusals(run: Path, prepared: Path, tmp_path: Path) -> None:
    def refused(place: Path, words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            load_model(place)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nothing", "RUN: .*nothing is not there; name a run folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; name a run folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no run folder, no checkpoint and no export; name runs/NAME")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / SWEEP_RECORD).write_text("{}")
    refused(tmp_path / "sweep", "sweep is the folder of a sweep; name a run in it")
    (tmp_path / "empty" / "checkpoints").mkdir()
    refused(tmp_path / "empty", "has no checkpoint yet")
    for kind, words in (
        ("gpt2", r"empty is a model of another program for transformers \(gpt2\); name a run folder"),
        ("switchall", r"empty is an export without its weights .*copy the whole folder again"),
    ):
        (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": kind}))
        refused(tmp_path / "empty", words)
        with pytest.raises(UserError, match=words):
            load_any(tmp_path / "empty")
    too_deep = "[" * 100_000  # for Python's reader of JSON
    (tmp_path / "empty" / "config.json").write_text(too_deep)
    refused(tmp_path / "empty", "has no checkpoint yet")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        model_config(too_deep, "config.json")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "switchall"}))
    (tmp_path / "empty" / "model.safetensors").write_text("")
    converted = tmp_path / "converted"
    convert(run / "checkpoints" / "step-00000002", converted, data=str(prepared))
    for read in (load_model, load_any, open_export):
        with pytest.raises(UserError, match=r"converted is what .* convert wrote for other programs"):
            read(converted)
    refused(tmp_path / "empty", "is an export, .* python launch/import_weights.py .*empty --to FOLDER")

    copy = shutil.copytree(run, tmp_path / "copy")
    newest = copy / "checkpoints" / "step-00000002"
    shard = newest / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(copy, "rank-00001.safetensors does not match its sha256; name an earlier one")
    shard.write_bytes(content[:-1])
    refused(copy, "rank-00001.safetensors is .* bytes, not .*; name an earlier one, such as .*step-00000001")
    refused(newest, "rank-00001.safetensors is .* bytes, not .*; copy the whole folder again, or name another")
    shard.unlink()
    refused(newest, "rank-00001.safetensors is missing; copy the whole folder again")
    rewrite_state(newest, lambda state: state.update(format_version=9))
    refused(copy, "has format 9, but this version reads 2")
    older = copy / "checkpoints" / "step-00000001"
    rewrite_state(older, lambda state: state["config"]["model"].update(novelty=1))
    refused(older, "another version wrote its configuration .*novelty")


def test_one_folder_of_data_is_as_good_as_a_list(run: Path, prepared: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for checkpoint in (copy / "checkpoints").iterdir():
        rewrite_state(checkpoint, lambda state: state["config"]["data"].update(manifest=str(tmp_path / "gone")))
    assert load_model(copy, data=str(prepared)).tokenizer.encode(TEXT) == load_model(run).tokenizer.encode(TEXT)


def test_a_device_that_is_not_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for read in (load_model, load_any):
        for device, words in (
            ("gpu", "device: is 'gpu'; give cpu, cuda, or one of several GPUs as cuda:1"),
            ("mps", "device: is 'mps'; give cpu"),
            (3.5, "device: is 3.5; give cpu"),
            ("cuda", "device: is cuda, but torch finds no usable GPU here .*; leave it out"),
        ):
            with pytest.raises(UserError, match=words):
                read(run, device=device)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device("cuda:0") == torch.device("cuda:0") and usable_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match=r"device: is cuda:1, but this process has 1 GPU "):
        usable_device("cuda:1")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Tokenizer", lambda stored: SimpleNamespace(vocab_size=401))
    with pytest.raises(UserError, match=r"its tokenizer has 401 ids, but model\.vocab_size is 400"):
        load_model(run)


def test_a_checkpoint_that_its_run_removes_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that goes on does (checkpoint.keep_last): before it is opened, the one before is the newest; while it is
    read, a sentence says so."""
    copy, opened, load = shutil.copytree(run, tmp_path / "copy"), Checkpoint.open, checkpoint_loading.load_weights
    newest = copy / "checkpoints" / "step-00000002"

    def removed_first(path: Path) -> Checkpoint:
        if path == newest:
            shutil.rmtree(newest)
        return opened(path)

    def removed_while_read(*arguments: Any, **named: Any) -> None:
        shutil.rmtree(copy / "checkpoints" / "step-00000001")
        load(*arguments, **named)

    monkeypatch.setattr(Checkpoint, "open", removed_first)
    assert find_checkpoint(copy).progress.step == 1
    monkeypatch.setattr(checkpoint_loading, "load_weights", removed_while_read)
    with pytest.raises(UserError, match=r"RUN: .*step-00000001 was removed while it was read, by a run that goes on"):
        load_model(copy)


@pytest.mark.parametrize("error", [PeerFailed(PassingError), RuntimeError("Connection closed by peer")])
def test_what_another_rank_says_of_a_checkpoint_that_was_removed_is_said_once(error: Exception, tmp_path: Path) -> None:
    """A rank that is told of it leaves quietly, with the code of that rank's error; one that has lost it says so."""
    with pytest.raises(type(error)) as found, while_they_are_there([tmp_path / "step-00000001"], "RUN"):
        raise error
    assert found.value is error


def test_a_run_folder_may_have_any_name(run: Path, tmp_path: Path) -> None:
    for name in ("step-size", "step-00000007"):
        (tmp_path / name).symlink_to(run)
        assert find_checkpoint(tmp_path / name).progress.step == 2


@pytest.mark.parametrize("text", ["a\udcffb", "\ud800"])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_half_of_a_surrogate_pair_is_no_text(prepared: Path, text: str, kind: str) -> None:
    manifest = Manifest.load(prepared)
    if kind == "bytes":
        entry = {"kind": kind, "file": None, "sha256": None, "eos_id": None, "vocab_size": 256}
        manifest = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update=entry)})
    place = len(text.rstrip("b"))
    with pytest.raises(UserError, match=rf"character {place} of the text, '\\ud.*; give text in UTF-8"):
        Tokenizer(manifest).encode(text)


def test_bytes_and_symbols(prepared: Path, tmp_path: Path) -> None:
    def tokenizer(**entry: object) -> Tokenizer:
        manifest = Manifest.load(prepared)
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(b"\n abc")
        changed = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update=entry)})
        changed._folder = folder
        return Tokenizer(changed)

    of_bytes = tokenizer(kind="bytes", file=None, sha256=None, eos_id=None, vocab_size=256)
    assert of_bytes.encode("aé") == [97, 195, 169] and of_bytes.decode(np.array([97, 195, 169])) == "aé"
    assert of_bytes.pieces([97, 195]) == ["a", "<0xC3>"] and of_bytes.bytes_of(np.bincount([97, 195, 195])) == 3
    symbols = tokenizer(kind="symbols", eos_id=None, vocab_size=5)
    assert symbols.encode("cab a\n") == [4, 2, 3, 1, 2, 0] and symbols.decode([4, 2, 3]) == "cab"
    with pytest.raises(UserError, match=r"holds the byte 0x64, which is none of the 5"):
        symbols.encode("abcd")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        tokenizer()


def test_the_sign_for_a_blank_is_what_the_data_have(prepared: Path) -> None:
    """SentencePiece itself takes it for a blank."""
    reference, tokenizer = TextTokenizer.load(prepared / "tokenizer.model"), Tokenizer(Manifest.load(prepared))
    for text in ("a \u2581 word\n\u2581\u2581b\u2581", "\u2581", "\u2581 c"):
        assert (
            tokenizer.encode(text) == reference.encode(text).tolist()
            and tokenizer.decode(tokenizer.encode(text)) == text
        )


def test_the_bytes_of_counted_ids_are_those_of_their_text(prepared: Path) -> None:
    tokenizer = Tokenizer(Manifest.load(prepared))
    ids = [*tokenizer.encode(f"{TEXT}\U0001f333"), tokenizer.eos_id or 0]
    assert tokenizer.bytes_of(np.bincount(ids)) == len(f" {TEXT}\U0001f333".encode())
    assert tokenizer.bytes_of(np.bincount([*ids, 0])) is None, "an unknown piece stands for any text"


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_ids_of_a_wider_model_have_no_text(prepared: Path, kind: str) -> None:
    manifest = Manifest.load(prepared)
    if kind == "bytes":
        entry = {"kind": kind, "file": None, "sha256": None, "eos_id": None, "vocab_size": 256}
        manifest = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update=entry)})
    tokenizer = Tokenizer(manifest)
    ids = tokenizer.encode("gab")
    wider = [*ids, tokenizer.vocab_size, tokenizer.vocab_size + 9]
    assert tokenizer.decode(wider) == "gab" and tokenizer.content(wider[-1]) == b""
    assert tokenizer.pieces(wider)[-1] == f"<unused {wider[-1]}>"
    assert tokenizer.bytes_of(np.bincount(wider)) == tokenizer.bytes_of(np.bincount(ids))


def test_lines_are_cut_one_by_one_where_the_data_were(prepared: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    manifest = Manifest.load(prepared)
    settings = {**raw["provenance"]["config"]["tokenizer"], "sentences": "lines"}
    provenance = manifest.provenance.model_copy(update={"config": {"tokenizer": settings}})
    changed = manifest.model_copy(update={"provenance": provenance})
    changed._folder = manifest.folder
    reference = TextTokenizer.load(prepared / "tokenizer.model")
    tokenizer = Tokenizer(changed)
    assert tokenizer.encode(TEXT) == reference.encode_lines(TEXT).tolist()
    for text in (TEXT, f"{TEXT}\n\n  and two blanks\n"):
        size = tokenizer.bytes_of(np.bincount(tokenizer.encode(text)))
        assert size == len(text.encode()) + (not text.endswith("\n")), "of all blanks before lines one at most counts"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        first, _, rest = text.partition("\n")
        stream = TextStream(tokenizer, after=f"{first}\n")
        assert "".join(map(stream.add, tokenizer.encode(rest))) + stream.end() == rest
    assert reference.encode_lines(TEXT).tolist() != reference.encode(TEXT).tolist()


@pytest.mark.parametrize("mask, backend", [(False, "triton"), (True, "reference")])
def test_a_gpu_computes_attention_by_documents_as_it_can(prepared: Path, mask: bool, backend: str) -> None:
    """A saved model is computed in fp32, in which our kernel takes no documents."""
    config = small_config(prepared, f"data.document_mask={str(mask).lower()}")
    assert loading.backends_of(config, torch.device("cuda")).causal_attention == backend
