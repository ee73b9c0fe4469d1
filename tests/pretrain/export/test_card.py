"""The model card of an export, and the evaluations that it and training.json tell of."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import Checkpoint
from pretrain.cli.export import main
from pretrain.evaluation.results import results_folder
from pretrain.export.card import CardFacts, _results
from pretrain.export.origin import evaluations_of
from tests.pretrain.export.models import TIED, checkpoint_of, model_of
from tests.pretrain.saved import rewrite_state


@pytest.fixture(scope="module")
def checkpoint(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint_of(model_of(TIED), tmp_path_factory.mktemp("checkpoints") / "step-00000003", prepared)


def test_the_card_says_what_the_model_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    results = results_folder(checkpoint)
    results.mkdir(parents=True)
    (results / "lambada.json").write_text('{"task": "lambada", "accuracy": 0.25, "perplexity": 31.5, "examples": 5153}')
    (results / "harness.json").write_text("[]")
    assert main([str(checkpoint.path), "--to", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    total = sum(parameter.numel() for parameter in model_of(TIED).parameters())
    for words in (
        "---\nlicense: unknown\nlibrary_name: transformers",
        f"| parameters | {total:,} |",
        "| tokens read | 168 |",
        "| validation loss | 5.2500 nats per token, perplexity 190.57 |",
        "| train | 800 documents, 82,094 tokens",
        "- `c4-train.json.gz` (c4), sha256 `",
        "| lambada | perplexity 31.5000, accuracy 0.2500 (5,153 examples) |",
        "The weights: not stated",
    ):
        assert words in card, card


def test_the_loss_of_a_model_of_bytes_is_in_bits_too() -> None:
    evaluations: list[dict[str, Any]] = []
    origin = {"config": {"evaluate": {"split": "test"}}, "evaluations": evaluations}
    losses = {"loss": 3 * math.log(2), "validation_loss": 2 * math.log(2)}
    facts = CardFacts(
        name="mine",
        license="unknown",
        dtype="float32",
        origin={**origin, **losses},
        provenance=None,
        data_sets=[],
        tokens_are_bytes=True,
        has_eos=False,
        has_text=False,
    )
    said = _results(facts)
    assert "| loss of the last training step | 2.0794 nats per token, perplexity 8.00; 3.0000 bits per byte |" in said
    assert "| test loss | 1.3863 nats per token, perplexity 4.00; 2.0000 bits per byte |" in said
    assert "bits" not in _results(replace(facts, tokens_are_bytes=False))


def test_the_card_has_the_held_out_loss_that_evaluate_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of a mean or an import there is no other. Each loss is called by the split that it is of."""
    place = shutil.copytree(checkpoint.path, tmp_path / "mean")
    rewrite_state(place, lambda state: state["config"]["evaluate"].update(split="test"))
    results = tmp_path / "evaluation" / "mean"
    results.mkdir(parents=True)
    of_split = {"task": "validation", "loss": 4.5, "perplexity": 90.0171, "tokens": 1024.0, "limit": None}
    (results / "validation.json").write_text(json.dumps({**of_split, "split": "validation"}))
    (results / "blimp.json").write_text('{"task": "blimp", "accuracy": 0.5, "examples": 201, "limit": 3}')
    assert main([str(place), "--to", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| validation split | loss 4.5000, perplexity 90.0171 (1,024 tokens) |" in card, card
    assert "| blimp | accuracy 0.5000 (201 examples, the first 3 of each file) |" in card, card
    assert "| test loss | 5.2500 nats" in card and "validation loss" not in card, card


def test_of_one_split_the_card_has_the_newest_evaluation(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Earlier versions wrote that of the test split to validation.json, where it may still be."""
    place = shutil.copytree(checkpoint.path, tmp_path / "mean")
    results, saved = tmp_path / "evaluation" / "mean", checkpoint.state["time"]
    results.mkdir(parents=True)
    of_split = {"task": "validation", "split": "test", "tokens": 1024.0}
    for name, loss, later in (("validation", 4.5, 1), ("test", 4.25, 2)):
        (results / f"{name}.json").write_text(json.dumps({**of_split, "loss": loss, "time": saved + later}))
    ours = Checkpoint.open(place)
    assert evaluations_of(ours) == [{"task": "validation", "split": "test", "tokens": 1024, "loss": 4.25}]


def test_the_card_has_what_the_run_found_while_it_trained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of this step, and of the course that led to it: step 3 came twice. What launch/evaluate.py found stands instead
    of it."""
    run = tmp_path / "run"
    place = shutil.copytree(checkpoint.path, run / "checkpoints" / checkpoint.path.name)
    rewrite_state(place, lambda state: state.pop("weights_only"))  # as of a run
    cbt = {"event": "evaluation", "task": "cbt", "examples": 9}
    rows: list[dict[str, Any]] = [
        {**cbt, "step": 3, "accuracy": 0.1, "limit": 5},
        {"event": "started", "step": 2},
        {**cbt, "step": 3, "accuracy": 0.25, "limit": 5},
        {"event": "evaluation", "step": 3, "task": "lambada", "accuracy": None, "perplexity": 31.5, "examples": 7},
        {"event": "evaluation", "step": 3, "task": "blimp", "accuracy": 0.5, "examples": 201, "limit": None},
        {"event": "evaluation", "step": 3, "task": "later"},
        {"event": "evaluation", "step": 4, "task": "cbt", "accuracy": 0.75, "examples": 9, "limit": None},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": ')
    ours = Checkpoint.open(place)
    assert evaluations_of(ours, ema=True) == []
    of_run = [
        {"task": "blimp", "examples": 201, "accuracy": 0.5},
        {"task": "cbt", "examples": 9, "limit": 5, "accuracy": 0.25},
        {"task": "lambada", "examples": 7, "perplexity": 31.5},
    ]
    assert evaluations_of(ours) == of_run
    results = results_folder(ours)
    results.mkdir(parents=True)
    file = {"task": "cbt", "accuracy": 0.3, "examples": 2500, "limit": None}
    (results / "cbt.json").write_text(json.dumps({**file, "time": ours.state["time"] + 1}))
    whole = {"task": "cbt", "examples": 2500, "accuracy": 0.3}
    assert evaluations_of(ours) == [whole, *(one for one in of_run if one["task"] != "cbt")]


def test_the_card_says_with_which_weights_the_run_began(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """By run and step, as nobody else has the places of this machine."""
    place = shutil.copytree(checkpoint.path, tmp_path / "step-00000003")
    first = "/home/me/runs/first/checkpoints/step-00000400"
    rewrite_state(place, lambda state: state["config"]["train"].update(init_from=first))
    assert main([str(place), "--to", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| began with | the weights of first step-00000400, whose training is not counted here |" in card
    assert main([str(checkpoint.path), "--to", str(tmp_path / "other")]) == 0
    assert "began with" not in (tmp_path / "other" / "README.md").read_text()


def test_an_evaluation_of_an_earlier_checkpoint_of_that_name_is_not_in_the_card(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As of a mean that was made anew under its name."""
    place = shutil.copytree(checkpoint.path, tmp_path / "mean")
    results = tmp_path / "evaluation" / "mean"
    results.mkdir(parents=True)
    saved = checkpoint.state["time"]
    for task, age in (("lambada", 1.0), ("cbt", -1.0)):
        content = {"task": task, "accuracy": 0.25, "examples": 9, "time": saved - age}
        (results / f"{task}.json").write_text(json.dumps(content))
    assert main([str(place), "--to", str(tmp_path / "mine")]) == 0
    told = json.loads((tmp_path / "mine" / "training.json").read_text())
    assert [found["task"] for found in told["evaluations"]] == ["cbt"]
    assert "lambada" not in (tmp_path / "mine" / "README.md").read_text()
