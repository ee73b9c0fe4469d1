"""train.ema_decay: the plain average of the weights after every update, kept, resumed and resharded bit by bit, and
validated without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import ConfigError, UserError
from model.language_model import build_model
from model.memory import layer_memories, separate_streams
from pretrain.checkpoint import Checkpoint, Retention, list_checkpoints
from pretrain.cli.evaluate import main as evaluate
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.engine.moving_average import MovingAverage
from pretrain.evaluate import evaluation_windows
from pretrain.export.writing import ExportOptions, export
from pretrain.report.disk_space import checkpoint_space
from pretrain.saved_model import find_checkpoint, load_model
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import spike_on_position, spoil_losses_of_steps, train_with
from tests.pretrain.runs import assert_bit_identical, events, small_config, trainer_of
from tests.pretrain.saved import whole_tensors

DECAY, STEPS, SKIPPED, STOP = 0.7, 4, 3, 2
BF16 = "train.precision=bf16"
QUICK = {
    "DP2 ZeRO-3": ("train.precision=fp32", "parallel.zero=3"),
    "PP2 bf16": ("train.precision=bf16", "parallel.pipeline=2", "model.tied_embedding=true"),
}
# Slow; QUICK has the property in the two layouts that differ most.
THOROUGH = {
    "DP2 ZeRO-0": ("train.precision=fp32", "parallel.zero=0"),
    "DP2 ZeRO-1 fp32": ("train.precision=fp32", "parallel.zero=1"),
    "DP2 ZeRO-1 bf16": ("train.precision=bf16", "parallel.zero=1"),
    "DP2 ZeRO-2 bf16": ("train.precision=bf16", "parallel.zero=2"),
    "DP2 ZeRO-3 bf16": ("train.precision=bf16", "parallel.zero=3"),
    "DP2 ZeRO-2 offloaded": ("train.precision=fp32", "parallel.zero=2", "parallel.offload_optimizer=true"),
    "TP2 ZeRO-0": ("train.precision=fp32", "parallel.zero=0", "parallel.tensor=2", "model.feedforward.num_experts=6"),
    "TP2 ZeRO-1": ("train.precision=bf16", "parallel.tensor=2", "model.feedforward.num_experts=6"),
    "EP2 ZeRO-2": ("parallel.zero=2", "parallel.expert=2", "model.feedforward.num_experts=6"),
    "PP2 fp32, memory": ("train.precision=fp32", "parallel.pipeline=2", "model.position.type=xl"),
}
TENSOR = ("parallel.tensor=2", "parallel.zero=1", "train.precision=fp32", "model.feedforward.num_experts=6")


def config_of(prepared: Path, layout: tuple[str, ...], *more: str) -> Config:
    keys = (
        f"train.ema_decay={DECAY}",
        f"train.steps={STEPS}",
        "evaluate.sequences=6",
        "evaluate.streams=2",
        "batch.micro_sequences=4",
    )
    return small_config(prepared, *layout, *keys, "checkpoint.every_steps=1", "checkpoint.keep_last=9", *more)


def runs(rank: int, prepared: Path, layouts: dict[str, tuple[str, ...]], folder: Path) -> None:
    """Of each layout an unbroken run that validates the average after every second step, and one that does not, and
    stops in between; the update of step SKIPPED is skipped in both."""
    for name, layout in layouts.items():
        validated = config_of(prepared, layout, "evaluate.ema=true", "evaluate.every_steps=2")
        plain = config_of(prepared, layout, "evaluate.sequences=0", "checkpoint.every_steps=9")
        stopped = config_of(prepared, layout, "evaluate.sequences=0", f"train.stop_after_steps={STOP}")
        for config, run_dir in (
            (validated, folder / name / "validated"),
            (stopped, folder / name / "resumed"),
            (plain, folder / name / "resumed"),
        ):
            assert train_with(rank, config, run_dir, spoil_losses_of_steps, (SKIPPED,), 1) == "FINISHED"


def kept(run_dir: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their average in the checkpoint of a step."""
    found = whole_tensors(run_dir / "checkpoints" / f"step-{step:08d}", prefixes=("master/", "ema/"))
    weights, average = (
        {name.removeprefix(kind): value for name, value in found.items() if name.startswith(kind)}
        for kind in ("master/", "ema/")
    )
    assert weights.keys() == average.keys() and weights
    return weights, average


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["quick", "thorough"])
def test_it_is_the_plain_average_of_the_weights(
    prepared: Path, tmp_path: Path, layouts: dict[str, tuple[str, ...]]
) -> None:
    run_ranks(runs, 2, prepared, layouts, tmp_path)
    for name, layout in layouts.items():
        config, run_dir = config_of(prepared, layout), tmp_path / name / "validated"
        initial = dict(build_model(config.model, seed=config.train.seed).named_parameters())
        expected = {key: value.detach().double() for key, value in initial.items()}
        expected["head.weight"] = expected.get("head.weight", expected["embedding.weight"])
        if config.train.precision == "bf16":
            expected = {key: value.bfloat16().double() for key, value in expected.items()}
        before: dict[str, Tensor] = {}
        for step in range(1, STEPS + 1):
            weights, average = kept(run_dir, step)
            for key, value in weights.items():
                if step == SKIPPED:
                    assert torch.equal(average[key], before[key]), f"{name}: {key} of the skipped step"
                else:
                    expected[key] = DECAY * expected[key] + (1.0 - DECAY) * value.double()
                error = float((average[key].double() - expected[key]).abs().max())
                assert error < 1e-6 * max(1.0, float(expected[key].abs().max())), f"{name}: {key} after step {step}"
            before = average
        assert not torch.equal(before["embedding.weight"], weights["embedding.weight"])
        # Stopped, resumed and never validated, and yet the same, weights and average.
        assert_bit_identical(tmp_path / name / "resumed", run_dir)
        rows = events(run_dir, "validation")
        assert [row["step"] for row in rows] == [2, 4]
        for row in rows:
            loss = validated_loss(run_dir / "checkpoints" / f"step-{row['step']:08d}")
            assert row["ema_loss"] == pytest.approx(loss, rel=3e-3 if config.train.precision == "bf16" else 1e-5), name
            assert row["ema_loss"] != row["loss"]


def validated_loss(checkpoint: Path) -> float:
    """Of the average, by the loaded model and a plain loop over the windows that a validation reads."""
    saved = load_model(checkpoint, ema=True)
    reader = Sources.load(saved.config).reader("validation", saved.config)
    windows = evaluation_windows(reader, saved.config)
    streams, losses = torch.arange(windows.shape[1]), []
    with torch.no_grad(), separate_streams(saved.model, streams, windows.shape[1]):
        for row in windows:
            tokens, targets = reader.read(row.clip(0))
            _, sequence_loss, _ = saved.model(tokens, targets, streams)
            losses += [float(loss) for loss, window in zip(sequence_loss, row, strict=True) if window >= 0]
            for _, memory in layer_memories(saved.model):
                memory.advance()
    return sum(losses) / len(losses)


def test_an_error_in_its_place_waits_for_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is full on one of them ended as a hang, nine minutes later."""
    calls: list[str] = []
    monkeypatch.setattr(MovingAverage, "_exchange", lambda self: calls.append("collective"))
    average = object.__new__(MovingAverage)
    with pytest.raises(torch.OutOfMemoryError), average.in_place_of_weights():
        raise torch.OutOfMemoryError
    assert calls == ["collective"]
    with average.in_place_of_weights():
        assert len(calls) == 2
    assert len(calls) == 3


def begin_late_and_divide_anew(rank: int, prepared: Path, folder: Path) -> None:
    """A run without an average that goes on with one, then saved again by tensor-parallel ranks."""
    experts = "model.feedforward.num_experts=6"
    layout = ("parallel.zero=2", BF16, experts)
    old = config_of(prepared, layout, "batch.micro_sequences=2", "train.ema_decay=0", f"train.stop_after_steps={STOP}")
    allowed = 'checkpoint.allow_changes=["train.ema_decay"]'
    new = config_of(prepared, layout, "batch.micro_sequences=2", allowed, "evaluate.ema=true")
    for config in (old, new):
        assert train_with(rank, config, folder / "run", lambda trainer: None) == "FINISHED"
    checkpoint = Checkpoint.open(list_checkpoints(folder / "run" / "checkpoints")[-1])
    trainer = trainer_of(config_of(prepared, TENSOR), checkpoint)
    trainer.saver.save(folder / "again", checkpoint.progress, extra={}, retention=Retention(keep_last=9))
    trainer.saver.finish()


def test_it_may_begin_late_and_any_layout_continues_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(begin_late_and_divide_anew, 2, prepared, tmp_path)
    run = tmp_path / "run"
    first = run / "checkpoints" / f"step-{STOP:08d}"
    assert not whole_tensors(first, prefixes=("ema/",)), "without train.ema_decay there is nothing of it"
    with pytest.raises(UserError, match="holds no moving average of the weights; leave --ema out"):
        load_model(first, ema=True)
    expected = {
        name.removeprefix("master/"): value for name, value in whole_tensors(first, prefixes=("master/",)).items()
    }
    for step in range(STOP + 1, STEPS + 1):
        weights, average = kept(run, step)
        expected = {name: DECAY * expected[name] + (1.0 - DECAY) * weights[name] for name in weights}
    assert all(torch.allclose(average[name], expected[name], atol=1e-6) for name in average)
    assert evaluate(["--ema", str(run)]) == 0
    found = json.loads((run / "evaluation" / f"step-{STEPS:08d}-ema" / "validation.json").read_text())
    in_bf16 = events(run, "validation")[-1]["ema_loss"]
    assert found["loss"] == pytest.approx(in_bf16, rel=3e-3) and found["moving_average"]
    export(find_checkpoint(run), tmp_path / "exported", ExportOptions(ema=True))
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in average.items())
    assert " bytes of weights' moving average, " in capsys.readouterr().out
    results = (tmp_path / "exported" / "README.md").read_text().partition("## Results")[2]
    assert f"| validation split | loss {found['loss']:.4f}, " in results and results.count(" loss ") == 1, results
    again = whole_tensors(list_checkpoints(tmp_path / "again")[-1], prefixes=("ema/",))
    assert all(torch.equal(again[f"ema/{name}"], value) for name, value in average.items())


def test_what_goes_with_it(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.ema: there is no moving average to validate.*train.ema_decay to"):
        small_config(prepared, "evaluate.ema=true")
    without, average = (
        checkpoint_space(small_config(prepared, *keys), tmp_path) for keys in ((), ("train.ema_decay=0.9",))
    )
    assert average.size * 3 == without.size * 4 and average.row().formula.startswith("16 x parameters")


def test_a_rollback_takes_it_back(prepared: Path, tmp_path: Path) -> None:
    """Position 36 (step 5) is bad: steps 4 and 5 go, with what they added to the average of step 3."""
    spiky = ("resilience.spike_window_steps=8", "resilience.spike_threshold=5", "resilience.spike_action=rollback")
    light = ("model.num_layers=1", "batch.micro_sequences=8")
    keys = (*light, "train.steps=6", "evaluate.sequences=0", "resilience.spike_skip_steps=2", *spiky)
    config = config_of(prepared, ("train.precision=fp32", "parallel.zero=1"), *keys)
    assert run_ranks(train_with, 1, config, tmp_path, spike_on_position, 36) == ["FINISHED"]
    (rollback,) = events(tmp_path, "rollback")
    assert (rollback["at_step"], rollback["first_step"], rollback["skipped"]) == (5, 4, [24, 40])
    _, average = kept(tmp_path, 1)
    for step in range(2, 7):
        weights, after = kept(tmp_path, step)
        for name, value in weights.items():
            expected = DECAY * average[name].double() + (1.0 - DECAY) * value.double()
            assert torch.allclose(after[name].double(), expected, rtol=0, atol=1e-6), f"{name} after step {step}"
        average = after
    (undone,) = (tmp_path / "checkpoints").glob("superseded-*")
    before = whole_tensors(undone, prefixes=("ema/",))
    assert not torch.equal(before["ema/embedding.weight"], kept(tmp_path, 4)[1]["embedding.weight"])
