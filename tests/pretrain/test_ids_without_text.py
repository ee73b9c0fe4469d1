"""A model of token ids whose tokenizer is not here: it trains as on their text, and writes and reads numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import pretrain.cli.analyze
import pretrain.cli.checkpoint
import pretrain.cli.evaluate
import pretrain.cli.export
import pretrain.cli.generate
import pretrain.cli.plan
from common.errors import UserError
from data_prep.cli import main as prepare
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from pretrain.api import open_model
from pretrain.checkpoint import list_checkpoints
from pretrain.checkpoint.initial import initial_checkpoint
from pretrain.data.sources import Sources
from pretrain.evaluation.training import RunTasks
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs

Command = Callable[[list[str]], int]
STEPS = ("train.steps=3", "evaluate.sequences=8", "checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def ids_of(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The data set of the text, made again from its ids alone, by the name of a tokenizer."""
    folder, text = tmp_path_factory.mktemp("ids"), Manifest.load(prepared)
    for split in ("train", "validation"):
        with SplitReader(text, split, verify_on_first_read=True) as reader:
            documents = [[*reader.document(number).tolist(), 1] for number in range(reader.num_documents)]
        np.save(folder / split, np.array([number for ids in documents for number in ids], "<i8"))
    settings = text.provenance.config["shard"]

    def make(name: str) -> Path:
        body = {
            "format": "token_array",
            "input": str(folder / "train.npy"),
            "validation_input": str(folder / "validation.npy"),
            "output": str(folder / name),
            "tokenizer": {"type": "ids", "name": name, "vocab_size": text.tokenizer.vocab_size},
            "end_of_document": text.tokenizer.eos_id,
            "shard": settings,
            "workers": 1,
        }
        (folder / "config.json").write_text(json.dumps(body))
        assert prepare(["run", "--config", str(folder / "config.json")]) == 0
        return folder / name

    return make


@pytest.fixture(scope="module")
def data(ids_of: Callable[[str], Path]) -> Path:
    return ids_of("other")


@pytest.fixture(scope="module")
def run(prepared: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained = [(small_config(data, *STEPS), folder / "ids"), (small_config(prepared, *STEPS), folder / "text")]
    run_ranks(train_runs, 1, trained)
    return folder / "ids"


def refused(command: Command, words: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    capsys.readouterr()
    assert command(list(arguments)) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1, said


def test_losses_are_those_of_the_text(run: Path) -> None:
    def losses(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: row[key] for key in ("step", "loss", "grad_norm", "tokens")} for row in rows]

    assert losses(run) == losses(run.parent / "text") and len(losses(run)) == 3


def test_a_prompt_is_ids_and_so_is_what_follows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy, against the model's own logits."""
    capsys.readouterr()
    options = ["--prompt", "5 17\n300", "--tokens", "6", "--temperature", "0"]
    assert pretrain.cli.generate.main([str(run), *options]) == 0
    opened = open_model(run)
    ids = [5, 17, 300]
    while len(ids) < 9 and ids[-1] != opened.tokenizer.eos_id:
        ids.append(int(opened.logits(ids)[-1, : opened.tokenizer.vocab_size].argmax()))
    ids = ids[: ids.index(1)] if 1 in ids else ids
    assert capsys.readouterr().out.split() == [str(number) for number in ids]
    assert opened.encode("5 17 300") == [5, 17, 300] and opened.pieces([5, 17]) == [" 5", " 17"]
    assert opened.encode(opened.tokenizer.decode(ids)) == ids
    loss = opened.loss("5 17 300 9")
    assert loss.mean > 0 and np.isnan(loss.bits_per_byte)
    assert opened.tokenizer.bytes_of(np.array([0, 3, 1])) is None


def test_the_held_out_loss_is_that_of_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for folder in (run, run.parent / "text"):
        assert pretrain.cli.evaluate.main([str(folder)]) == 0
        (result,) = folder.glob("evaluation/*/validation.json")
        found.append(json.loads(result.read_text()))
    assert found[0]["loss"] == found[1]["loss"] and found[0]["unigram_perplexity"] == found[1]["unigram_perplexity"]
    assert "bits_per_byte" not in found[0]


def test_what_needs_text_says_that_there_is_none(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(run)
    ids = "token ids whose tokenizer is not here .tokenizer.type ids., so there is no text; give ids .*, 0 to 399, "
    refused(pretrain.cli.generate.main, f"{ids}instead of 'the'", capsys, place, "--prompt", "the sea")
    refused(pretrain.cli.generate.main, f"{ids}instead of '400'", capsys, place, "--prompt", "5 400")
    refused(pretrain.cli.generate.main, f"{ids}instead of '-3'", capsys, place, "--prompt", "-3")
    refused(pretrain.cli.generate.main, "--until: the run's data", capsys, place, "--prompt", "5", "--until", "6")
    refused(pretrain.cli.analyze.main, f"--text: the run's data are {ids}instead of", capsys, place)
    (tmp_path / "lambada").mkdir()
    text = "and this task is text; export the model"
    refused(pretrain.cli.evaluate.main, text, capsys, place, "--tasks", f"lambada={tmp_path / 'lambada'}")
    config = small_config(data, *STEPS, f'evaluate.tasks={{"lambada": "{tmp_path / "lambada"}"}}')
    with pytest.raises(UserError, match=f"evaluate.tasks: the run's data .*{text}"):
        RunTasks.open(config, Sources.load(config))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    planned = ["check", str(tmp_path / "config.json"), "--run-dir", str(tmp_path / "run"), "--no-step"]
    refused(pretrain.cli.plan.main, f"evaluate.tasks: the run's data .*{text}", capsys, *planned)


@pytest.mark.slow  # the fast one, but for the pages: test_two_runs_side_by_side in cli/test_analyze.py
def test_ids_are_analysed(run: Path, tmp_path: Path) -> None:
    place = str(run)
    (tmp_path / "ids").write_text("5 17 300 " * 20)
    assert pretrain.cli.analyze.main([place, "--text", str(tmp_path / "ids"), "--out", str(tmp_path / "page")]) == 0
    assert json.loads((tmp_path / "page" / "analysis.json").read_text())


def test_an_export_has_no_tokenizer_and_comes_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # not where every worker collects

    capsys.readouterr()
    assert pretrain.cli.export.main([str(run), "--to", str(tmp_path / "mine"), "--verify"]) == 0
    assert "transformers gives logits that differ by at most" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert not {name for name in names if "token" in name} and "modeling_switchall.py" in names
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["eos_token_id"] == 1
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "It has no tokenizer: training read token ids" in card and "bytes of text" not in card
    users = Tokenizer(models.WordLevel({f"w{number}": number for number in range(400)}, unk_token="w0"))
    users.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=users, eos_token="w1").save_pretrained(tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine", trust_remote_code=True)("w5 w6 w7").input_ids == [5, 6, 7]
    opened, before = open_model(tmp_path / "mine"), open_model(run)
    assert torch.equal(opened.logits("5 6 7"), before.logits("5 6 7"))


def test_weights_go_on_with_their_own_ids_alone(
    run: Path,
    data: Path,
    ids_of: Callable[[str], Path],
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert pretrain.cli.checkpoint.main(["convert", str(run), str(tmp_path / "weights")]) == 0
    assert "no tokenizer: the data are token ids of one that is not here" in capsys.readouterr().out
    assert len(load_file(tmp_path / "weights" / "model.safetensors")) > 4
    last = [str(path) for path in list_checkpoints(run / "checkpoints")[-2:]]
    assert len(last) == 2
    assert pretrain.cli.checkpoint.main(["average", *last, "--to", str(tmp_path / "mean")]) == 0
    assert open_model(tmp_path / "mean").encode("5 6") == [5, 6]
    mixed = f'data.sources=[{{"manifest": "{data}", "weight": 1}}, {{"manifest": "{ids_of("third")}", "weight": 1}}]'
    with pytest.raises(UserError, match="was made with another tokenizer"):
        Sources.load(small_config(data, 'data.manifest=""', mixed))
    newest = list_checkpoints(run / "checkpoints")[-1]
    for folder, is_ours in ((data, True), (ids_of("third"), False), (prepared, False)):
        config = small_config(folder, f"train.init_from={newest}")
        sha256 = Sources.load(config).tokenizer.sha256
        if is_ours:
            assert initial_checkpoint(config, sha256) is not None
            continue
        with pytest.raises(UserError, match="was trained with another tokenizer"):
            initial_checkpoint(config, sha256)
