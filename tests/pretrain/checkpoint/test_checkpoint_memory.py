"""Stopping and resuming with Transformer-XL memory: part of the state, in any layout, but only of the same text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from model.memory import layer_memories
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from tests.corpus import prepare_corpus
from tests.harness import RankFailed, run_ranks
from tests.pretrain.family import EXPERT_DROPOUT
from tests.pretrain.runs import (
    assert_bit_identical,
    assert_same,
    assert_same_metrics,
    engine_trace,
    events,
    light_config,
    metrics,
    one_step,
    plain_trace,
    small_config,
    train_and_keep_output,
    train_runs,
    trainer_of,
)


def test_xl_memory_moves_to_another_layout_and_refuses_another_number_of_streams(
    prepared: Path, tmp_path: Path
) -> None:
    """Of other micro-batches too."""
    keys = (*EXPERT_DROPOUT, "model.position.type=xl", "train.steps=6", "evaluate.sequences=0")
    run_ranks(train_runs, 1, [(small_config(prepared, *keys, "parallel.zero=0"), tmp_path / "unbroken")])
    first = small_config(prepared, *keys, "train.stop_after_steps=4", "parallel.zero=2")
    run_ranks(train_runs, 2, [(first, tmp_path / "saved")])
    for ranks, zero in ((1, 0), (4, 3)):
        target = tmp_path / f"resumed-{ranks}-{zero}"
        layout = (f"parallel.zero={zero}", f"batch.micro_sequences={8 // ranks}")
        shutil.copytree(tmp_path / "saved", target)
        run_ranks(train_runs, ranks, [(small_config(prepared, *keys, *layout), target)])
        assert_same_metrics(target, tmp_path / "unbroken")
        assert {event["key"] for event in events(target, "changed_setting")} >= {"train.stop_after_steps"}
    more = small_config(
        prepared, *keys, "batch.global_sequences=16", 'checkpoint.allow_changes=["batch.global_sequences"]'
    )
    with pytest.raises(RankFailed, match=r"memory of 8 streams.*set batch.global_sequences to 8"):
        run_ranks(train_runs, 1, [(more, tmp_path / "saved")])


@pytest.mark.slow  # test_streams_that_begin_again_remember_nothing is the fast one
def test_streams_that_begin_again_forget_also_over_a_resume(tmp_path: Path) -> None:
    """An epoch of few chunks: the runs pass the wrap twice, and one stops exactly there."""
    prepared = prepare_corpus(tmp_path / "corpus", documents=40)
    # Dense: a routing choice that rounding decides would need another seed.
    keys = ("model.position.type=xl", 'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}')
    keys += ('model.feedforward={"type": "dense", "hidden_size": 20}', "batch.global_sequences=64")
    # A low rate: Adam turns the rounding of small gradients into steps, 2e-5 of the norm at 0.004.
    keys += ("evaluate.sequences=0", "optimizer.learning_rate=0.0005")
    config = small_config(prepared, *keys, "batch.micro_sequences=64", "train.steps=9")
    reference = plain_trace(config, 9, (0, 4, 8))
    divided = small_config(prepared, *keys, "batch.micro_sequences=16", "train.steps=9", "parallel.zero=2")
    trace = run_ranks(engine_trace, 2, [divided], 9, (0, 4, 8))[0][0]
    assert_same(trace, reference, "over the wrap")
    epochs = [line["epoch"] for line in _run(divided, tmp_path / "unbroken")]
    wrap = epochs.index(1.0) + 1
    assert 2 <= wrap <= 4 and epochs[-1] > 2
    _run(divided.replaced("train", stop_after_steps=wrap), tmp_path / "resumed")
    _run(divided, tmp_path / "resumed")
    assert_bit_identical(tmp_path / "resumed", tmp_path / "unbroken")


def remembered(rank: int, config: Config) -> list[int]:
    """How many tokens before its own each of five steps sees."""
    trainer, seen = trainer_of(config), []
    train = trainer.executor.train

    def counted(*args: Any) -> Any:
        seen.extend({memory.length for _, memory in layer_memories(trainer.engine.module)})
        return train(*args)

    vars(trainer.executor).update(train=counted)
    for step in range(5):
        one_step(trainer, Progress(step, 8 * step))
    return seen


def test_streams_that_begin_again_remember_nothing(prepared: Path) -> None:
    config = light_config(prepared, "model.position.type=xl", "data.max_tokens=256")  # 8 streams of 2 windows
    assert run_ranks(remembered, 1, config) == [[0, 16, 0, 16, 0]]


def _run(config: Config, folder: Path) -> list[dict[str, Any]]:
    run_ranks(train_runs, 2, [(config, folder)])
    return metrics(folder)


@pytest.mark.parametrize("change", ["data.manifest", "data.max_tokens", "model.sequence_length", "train.precision"])
def test_memory_of_other_text_is_not_restored_and_precision_may_change(
    prepared: Path, tmp_path: Path, change: str
) -> None:
    keys = ("model.position.type=xl", "train.steps=6", "evaluate.sequences=0")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys, "train.stop_after_steps=3"), tmp_path / "run")])
    other = prepared
    if change == "data.manifest":
        other = prepare_corpus(tmp_path / "other", seed=9, tokenizer=prepared / "tokenizer.model")
    values = {"data.manifest": other, "data.max_tokens": 20_000, "model.sequence_length": 12, "train.precision": "bf16"}
    value = values[change]
    config = light_config(other, *keys, f"{change}={value}", f'checkpoint.allow_changes=["{change}"]')
    output = tmp_path / "printed"
    run_ranks(train_and_keep_output, 1, [(config, tmp_path / "run")], output)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))
    assert ("memory begins empty" in output.read_text()) is (change != "train.precision")
