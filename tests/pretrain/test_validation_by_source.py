"""The validation loss of each source of a mixture: the mean over its own windows, in every layout, wherever the total
is shown."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from data_prep.cli import main as data_prep
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from model.language_model import build_model
from model.parallel.context import ParallelContext
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.checkpoint.loading import load_weights
from pretrain.cli.checkpoint import main as convert
from pretrain.cli.compare import main as compare
from pretrain.cli.evaluate import main as evaluate_checkpoint
from pretrain.cli.export import main as export
from pretrain.cli.import_weights import main as import_weights
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.data.windows import Batch
from pretrain.evaluate import evaluate, evaluation_windows
from pretrain.export.origin import evaluations_of
from pretrain.parallel.context import parallel_context
from pretrain.report.event_text import event_text
from pretrain.report.source_losses import sources_text
from pretrain.saved_model import load_model
from pretrain.views.reading import RunView
from pretrain.views.status import screen, summary, validation_text
from tests.corpus import write_dump
from tests.harness import run_ranks
from tests.pretrain.report.boards import read, steps_of
from tests.pretrain.runs import events, small_config, train_and_keep_output, train_runs
from tests.pretrain.saved import rewrite_state

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
SEQUENCES = 21
"""Divides evenly over neither ranks nor micro-batches."""


@pytest.fixture(scope="module")
def sources(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets of one tokenizer; the held-out split of the second is a third of the first's."""
    folder = tmp_path_factory.mktemp("mixture")
    write_dump(folder / "train.json.gz", documents=60, seed=7)
    write_dump(folder / "validation.json.gz", documents=20, seed=8)
    config = {
        "input": [str(folder / "train.json.gz")],
        "validation_input": [str(folder / "validation.json.gz")],
        "output": str(folder / "pes2o"),
        "workers": 1,
        "tokenizer": {"model": str(prepared / "tokenizer.model")},
    }
    (folder / "data.json").write_text(json.dumps(config))
    assert data_prep(["run", "--config", str(folder / "data.json")]) == 0
    return {"c4": prepared, "pes2o": folder / "pes2o"}


def mixture(sources: dict[str, Path], *overrides: str) -> Config:
    entries = [{"manifest": str(path), "weight": 1, "name": name} for name, path in sources.items()]
    keys = ("train.steps=1", "batch.micro_sequences=4", f"evaluate.sequences={SEQUENCES}")
    experts = ("model.attention.num_experts=4", "model.feedforward.num_experts=6")
    return small_config(sources["c4"], f"data.sources={json.dumps(entries)}", *keys, *experts, *overrides)


def validation(run: Path) -> dict[str, Any]:
    return events(run, "validation")[0]


def by_hand(config: Config, sources: dict[str, Path], run: Path) -> dict[str, list[float]]:
    """The loss of each window that a validation reads, by source: one window after the other in plain PyTorch, from the
    weights that a run saved."""
    T = config.model.sequence_length
    network = build_model(config.model, seed=99).eval()
    load_weights(Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]), network, ParallelContext())
    texts = []
    for name, path in sources.items():
        manifest = Manifest.load(path)
        with SplitReader(manifest, "validation", verify_on_first_read=False) as split:
            text = split.read(0, manifest.num_tokens("validation")).astype(np.int64)
        texts += [(name, text[n * T : n * T + T + 1]) for n in range((len(text) - 1) // T)]
    losses = defaultdict(list)
    for n in range(SEQUENCES):
        name, window = texts[n * len(texts) // SEQUENCES]
        with torch.no_grad():
            logits = network.logits(torch.from_numpy(window[None, :-1]))[0][0]
        loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(window[1:]))
        losses[name].append(float(loss))
    return losses


def test_each_source_has_the_mean_loss_of_its_windows_in_every_layout(sources: dict[str, Path], tmp_path: Path) -> None:
    layouts = {
        "data": ("parallel.zero=3",),
        "tensor": ("parallel.tensor=2",),
        "pipeline": ("parallel.pipeline=2",),
        "expert": ("parallel.expert=2",),
    }
    one = mixture(sources, "parallel.zero=0")
    run_ranks(train_runs, 1, [(one, tmp_path / "one")])
    run_ranks(train_runs, 2, [(mixture(sources, *keys), tmp_path / name) for name, keys in layouts.items()])
    expected = by_hand(one, sources, tmp_path / "one")
    assert min(map(len, expected.values())) > 2 and len(expected["c4"]) != len(expected["pes2o"])
    means = {f"loss/{name}": pytest.approx(np.mean(losses), rel=1e-5) for name, losses in expected.items()}
    tokens = {f"tokens/{name}": len(losses) * 16 for name, losses in expected.items()}
    for name in ("one", *layouts):
        event = validation(tmp_path / name)
        assert {key: value for key, value in event.items() if "/" in key} == means | tokens, name
        total = sum(event[f"loss/{source}"] * event[f"tokens/{source}"] for source in sources)
        assert event["loss"] == pytest.approx(total / event["tokens"], rel=1e-6)


class TokenMeans:
    """Stands for a model: the loss of a window is the mean of its tokens, that of the windows in `broken` is NaN."""

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.module, self._broken = torch.nn.Identity(), torch.tensor(broken, dtype=torch.int64)

    def evaluate(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        means = [batch.tokens.float().mean(1) / 7 for batch in batches]
        return [
            loss.masked_fill(torch.isin(batch.sequence_index, self._broken), float("nan"))
            for loss, batch in zip(means, batches, strict=True)
        ]


def validated(rank: int, config: Config, broken: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the mixture; and of the same windows if nothing says that they are of several sources."""
    reader, parallel = Sources.load(config).reader("validation", config), parallel_context(config)
    as_one = SimpleNamespace(
        read=reader.read,
        sequence_length=reader.sequence_length,
        num_windows=reader.num_windows,
        tokens_are_bytes=False,
        sizes=(reader.num_windows,),
    )
    found = [
        evaluate(TokenMeans(broken), windows, config, parallel, torch.device("cpu"))  # type: ignore[arg-type]
        for windows in (reader, as_one)
    ]
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_total_is_bit_by_bit_that_without_sources(sources: dict[str, Path], ranks: int) -> None:
    for mixed, plain in run_ranks(validated, ranks, mixture(sources, "batch.global_sequences=12"), []):
        assert {key: value for key, value in mixed.items() if "/" not in key} == plain


def test_the_windows_at_the_border_belong_to_their_own_source(sources: dict[str, Path]) -> None:
    """All windows of both, so the last of the first source and the first of the second too."""
    ((mixed, _),) = run_ranks(validated, 1, mixture(sources, "evaluate.sequences=1000000"), [])
    for name, path in sources.items():
        manifest = Manifest.load(path)
        count = (manifest.num_tokens("validation") - 1) // 16
        with SplitReader(manifest, "validation", verify_on_first_read=False) as split:
            mean = split.read(0, count * 16).astype(np.float64).mean()
        assert mixed[f"tokens/{name}"] == count * 16
        assert mixed[f"loss/{name}"] == pytest.approx(mean / 7, rel=1e-6)


def test_a_source_without_a_window_is_left_out(sources: dict[str, Path]) -> None:
    ((mixed, _),) = run_ranks(validated, 1, mixture(sources, "evaluate.placement=start"), [])
    assert {key for key in mixed if "/" in key} == {"loss/c4", "tokens/c4"}
    assert mixed["loss/c4"] == pytest.approx(mixed["loss"], rel=1e-6) and mixed["tokens/c4"] == mixed["tokens"]


def test_a_loss_that_is_not_finite_stays_with_its_source(sources: dict[str, Path]) -> None:
    ((mixed, _),) = run_ranks(validated, 1, mixture(sources), [SEQUENCES - 1])
    assert np.isnan(mixed["loss"]) and np.isnan(mixed["loss/pes2o"]) and np.isfinite(mixed["loss/c4"])


def test_a_line_names_six_sources_and_how_many_more() -> None:
    losses = {"a": 1.0, "b": None, "c": float("nan"), "d": 4, "e": 5.0, "f": 6.0, "g": 7.0, "h": 8.0}
    text = "a 1.0000, b not finite, c not finite, d 4.0000, e 5.0000, f 6.0000 and 2 more"
    assert sources_text(losses) == text


@pytest.mark.slow  # the fast one: test_each_source_has_the_mean_loss_of_its_windows_in_every_layout
def test_the_sources_are_shown_where_the_total_is(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    keys = ("monitor.tensorboard=true", "train.ema_decay=0.5", "evaluate.ema=true")
    one_source = mixture({"c4": sources["c4"]}, *keys)
    run_ranks(train_and_keep_output, 1, [(mixture(sources, *keys), run), (one_source, alone)], tmp_path / "out")
    event = validation(run)
    assert not any("/" in key for key in validation(alone)), "one source is the total"
    of_sources = f"c4 {event['loss/c4']:.4f}, pes2o {event['loss/pes2o']:.4f}"
    lines = [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("validation after")]
    assert f"({of_sources}); moving average" in lines[0] and "(" not in lines[1]

    board = read(run / "tensorboard")
    for tag, key in (("c4", "loss/c4"), ("pes2o of the moving average", "ema_loss/pes2o")):
        assert steps_of(board, f"validation loss by source/{tag}") == [1]
        (point,) = board.Scalars(f"validation loss by source/{tag}")
        assert point.value == pytest.approx(event[key], rel=1e-6)
    assert "ema_tokens/c4" not in event
    table = PAGE.partition("## What a validation writes")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([a-z_/A-Z]+)`", "".join(re.findall(r"(?m)^\|(.*?)\|", table))))
    written = {key.replace("/c4", "/NAME") for key in event if not key.endswith("/pes2o")} - {"event", "time"}
    assert documented == written

    average = f"{event['ema_loss']:.4f}"
    told = f"{event['loss']:.4f} after step 1 ({of_sources}); moving average {average}"
    assert validation_text(RunView.open(run), "validation") == told
    loss = f"validation after step 1: loss {event['loss']:.4f}"
    assert event_text(event, 0.0).endswith(f"  {loss} ({of_sources}); moving average: loss {average}")
    assert f"{loss} (" in screen(RunView.open(run), width=120, now=0.0)
    assert "(" not in event_text(validation(alone), 0.0)
    known = {name: event[f"loss/{name}"] for name in sources}
    assert summary(RunView.open(run))["validations_by_source"] == [[1, known]]
    assert summary(RunView.open(alone))["validations_by_source"] == []
    capsys.readouterr()
    assert compare([str(run), str(alone), "--out", str(tmp_path / "page")]) == 0
    table = capsys.readouterr().out.partition("Validation loss by source after step 1\n")[2].splitlines()
    assert [line.split() for line in table[1:3]] == [[name, f"{loss:.4f}", "-"] for name, loss in known.items()]

    assert evaluate_checkpoint([str(run)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(next((run / "evaluation").rglob("validation.json")).read_text())
    for name, loss in known.items():
        assert found[f"loss/{name}"] == pytest.approx(loss, rel=1e-6)
        assert ["validation", name, "loss", f"{loss:.4f}"] in [line.split() for line in printed.splitlines()]


def test_data_of_a_mixture_that_moved_are_named_with_data(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any of them has the tokenizer; a validation needs all, each in its place, and is what it was."""
    run, there = tmp_path / "run", {name: tmp_path / f"{name} here" for name in sources}
    for name, folder in sources.items():
        shutil.copytree(folder, there[name])
    config = mixture(there)
    run_ranks(train_runs, 1, [(config, run)])
    known = validation(run)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    c4, pes2o = (folder.rename(tmp_path / f"{name} now") for name, folder in there.items())
    capsys.readouterr()

    def refusal(code: int) -> str:
        assert code == 2
        return capsys.readouterr().err

    assert "name the place of the prepared data with --data" in refusal(evaluate_checkpoint([str(run)]))
    said = refusal(evaluate_checkpoint([str(run), "--data", str(c4)]))
    assert "validation: data.sources.1.manifest: there is no" in said and said.endswith("data with --data\n")
    other, dump = tmp_path / "other", tmp_path / "other.json.gz"
    write_dump(dump, documents=30, seed=3)
    (tmp_path / "data.json").write_text(
        json.dumps(
            {
                "input": str(dump),
                "validation_fraction": 0.2,
                "output": str(other),
                "workers": 1,
                "tokenizer": {"model": str(c4 / "tokenizer.model")},
            }
        )
    )
    assert data_prep(["run", "--config", str(tmp_path / "data.json")]) == 0
    assert "is none of the data sets that the run read" in refusal(
        evaluate_checkpoint([str(run), "--data", str(other)])
    )

    places = ["--data", str(pes2o), "--data", str(c4), "--out", str(tmp_path / "found")]
    assert evaluate_checkpoint([str(run), *places]) == 0
    found = json.loads((tmp_path / "found" / "validation.json").read_text())
    for key in ("loss", "loss/c4", "loss/pes2o", "tokens/pes2o"):
        assert found[key] == pytest.approx(known[key], rel=1e-6)
    for number, place in enumerate((c4, pes2o)):
        assert convert(["convert", str(checkpoint), str(tmp_path / f"weights {number}"), "--data", str(place)]) == 0
        assert (tmp_path / f"weights {number}" / "tokenizer.model").read_bytes() == (
            c4 / "tokenizer.model"
        ).read_bytes()
    c4.rename(there["c4"])  # what is left has the tokenizer, and nobody needs to say where
    assert convert(["convert", str(checkpoint), str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights" / "tokenizer.model").exists()


def test_the_held_out_split_of_other_data_is_a_task_of_its_own(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of one data set on another: what a loop over windows says. It is no result of the run's own data."""
    run, keys = tmp_path / "run", ("train.steps=1", "evaluate.sequences=9", "data.max_tokens=1000")
    config = small_config(sources["c4"], *keys)
    run_ranks(train_runs, 1, [(config, run)])
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    before = evaluations_of(Checkpoint.open(checkpoint))
    capsys.readouterr()
    assert evaluate_checkpoint([str(run), "--tasks", f"validation={sources['pes2o']}"]) == 0
    found = json.loads((run / "evaluation" / checkpoint.name / "validation-pes2o.json").read_text())
    other = config.replaced("data", manifest=str(sources["pes2o"]), sources=(), max_tokens=None)
    reader = Sources.load(other).reader("validation", other)
    inputs, targets = reader.read(evaluation_windows(reader, other).ravel())
    logits = load_model(run).model.logits(inputs)[0]
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["tokens"] == targets.numel()
    assert found["digest"] == Manifest.load(sources["pes2o"]).digest
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sources["pes2o"] / "tokenizer.model"))
    texts = [pieces.decode([anchor, *row]) for anchor, row in zip(inputs[:, 0].tolist(), targets.tolist(), strict=True)]
    anchors = [pieces.decode([anchor]) for anchor in inputs[:, 0].tolist()]
    size = len("".join(texts).encode()) - len("".join(anchors).encode())
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * found["tokens"] / size, rel=1e-12)
    assert ["validation", "pes2o", "loss", f"{expected:.4f}"] in [
        x.split() for x in capsys.readouterr().out.splitlines()
    ]
    assert evaluations_of(Checkpoint.open(checkpoint)) == before, "a model card would show it as the run's own"
    monkeypatch.chdir(sources["pes2o"])
    before = sorted((run / "evaluation" / checkpoint.name).iterdir())
    assert evaluate_checkpoint([str(run), "--tasks", "validation=.", "--limit", "2"]) == 0
    assert sorted((run / "evaluation" / checkpoint.name).iterdir()) == before, "not the file of the run's own data"
    # Other data whose folder has the same name replace no result of these.
    monkeypatch.chdir(shutil.copytree(sources["c4"], tmp_path / "others" / "pes2o"))
    for _ in range(2):
        assert evaluate_checkpoint([str(run), "--tasks", "validation=.", "--limit", "2"]) == 0
    digests = [Manifest.load(sources[name]).digest for name in ("c4", "pes2o")]
    written = {path.name: path for path in (run / "evaluation" / checkpoint.name).iterdir()}
    assert set(written) == {*(path.name for path in before), f"validation-pes2o-{digests[0][:12]}.json"}
    assert json.loads(written["validation-pes2o.json"].read_text())["digest"] == digests[1]
    capsys.readouterr()

    def refused(words: str, *arguments: str) -> None:
        assert evaluate_checkpoint([str(run), *arguments]) == 2
        assert re.search(words, capsys.readouterr().err)

    refused(r"--data s3://a/b: is behind a URL; name a local copy", "--data", "s3://a/b")
    refused(r"--data .*pes2o is not the data set .*: --tasks validation=FOLDER", "--data", str(sources["pes2o"]))
    there = ("--tasks", f"validation={sources['pes2o']}")
    refused(r"--tasks validation=.*: evaluate.split: .* has no test split", *there, "--set", "evaluate.split=test")
    rewrite_state(checkpoint, lambda state: state.update(tokenizer_sha256="0" * 64))
    refused(r"--tasks validation=.*: was made with another tokenizer than the model's", *there)


def test_the_card_of_an_export_has_every_data_set_that_the_run_has_read(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of both sources, then one of the second alone; the import of the export knows them too."""
    run, keys = tmp_path / "run", ("train.steps=3", "evaluate.sequences=0")
    both = mixture(sources, *keys, "train.stop_after_steps=2")
    rows = json.dumps([{"manifest": str(sources["pes2o"]), "weight": 1, "name": "pes2o"}])
    alone = mixture(sources, *keys, f"data.sources={rows}", 'checkpoint.allow_changes=["data.sources"]')
    for config in (both, alone):
        run_ranks(train_runs, 1, [(config, run)])
    assert export([str(run), "--to", str(tmp_path / "mine"), "--data", str(sources["c4"])]) == 0
    G, T = both.batch.global_sequences, both.model.sequence_length
    data = (tmp_path / "mine" / "README.md").read_text().partition("## Data\n")[2].partition("## Results")[0]
    parts = dict(part.split("\n", 1) for part in data.split("### ")[1:])
    assert parts.keys() == sources.keys()
    for name, count, file in (("c4", G, "c4-train.json.gz"), ("pes2o", 2 * G, "train.json.gz")):
        manifest = Manifest.load(sources[name])
        assert f"The run has read {count * T:,} tokens of it. Its digest is `{manifest.digest}`." in parts[name]
        assert f"| train | {manifest.totals['train'].documents:,} documents, " in parts[name]
        assert f"- `{file}` (" in parts[name]
    assert f"| tokens read | {3 * G * T:,} |" in (tmp_path / "mine" / "README.md").read_text()

    capsys.readouterr()
    assert export([str(run), "--to", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "What it was made from is not known here." in card and "c4-train" not in card
    assert import_weights([str(tmp_path / "mine"), "--to", str(tmp_path / "again")]) == 0
    (saved,) = list_checkpoints(run / "checkpoints")[-1:]
    assert Checkpoint.open(tmp_path / "again").progress == replace(Checkpoint.open(saved).progress, skipped_updates=0)
