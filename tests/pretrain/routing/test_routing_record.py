"""Choices of experts are recorded by a run and replayed by others, in any layout; a record that does not fit is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigError, UserError
from common.files import temporary_path
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.routing.tape import Flips
from tests.harness import run_ranks
from tests.pretrain.matrix import MODELS, dropouts
from tests.pretrain.runs import COMPARED, metrics, small_config, train_runs

TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"
STEPS = 4
SHORT = (f"train.steps={STEPS}", "evaluate.sequences=0", "checkpoint.every_steps=100", "train.seed=5")
SHORT += ("batch.micro_sequences=4",)  # two micro-steps on one rank
TWO_LAYERS = ("model.num_layers=2", "batch.micro_sequences=8")
"""Of four, in one micro-step, where no layout is compared."""
TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "recompute full": (1, ("train.recompute=full",)),
    "recompute selective": (1, ("train.recompute=selective",)),
    "DP2 micro 1": (2, ("batch.micro_sequences=1",)),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, ("parallel.pipeline=2",)),
    "EP2": (2, ("parallel.expert=2",)),
    "TP2 PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "TP2 SP PP2": (4, (*TP2_SP, "parallel.pipeline=2")),
    "TP2 SP EP2": (4, (*TP2_SP, "parallel.expert=2")),
}
OF_MODEL = {
    "switchall": ("TP2 SP",),
    "switchall xl": ("recompute full", "recompute selective", "TP2 SP", "PP2", "EP2", "TP2 PP2"),
    "moa": ("TP2 SP", "DP2 micro 1", "PP2"),
}


def config_of(prepared: Path, model: str, layout: str, *overrides: str) -> Config:
    return small_config(prepared, *SHORT, *MODELS[model], *dropouts(model), *LAYOUTS[layout][1], *overrides)


def run(ranks: int, *runs: tuple[Config, Path]) -> None:
    run_ranks(train_runs, ranks, list(runs))


def change_choices(folder: Path) -> int:
    """Moves every choice of a record to the next expert, what no router would choose. Returns how many."""
    content, changed = json.loads((folder / "record.json").read_text()), 0
    for path in folder.glob("step-*/*.safetensors"):
        tensors = load_file(path)
        for name, (_, num_experts, _) in content["routers"].items():
            if f"{name}/index" in tensors:
                index = tensors[f"{name}/index"]
                tensors[f"{name}/index"] = ((index.int() + 1) % num_experts).to(index.dtype)
                changed += index.numel()
        save_file(tensors, path)
    return changed


def assert_close(ours: Path, theirs: Path) -> None:
    for mine, its in zip(metrics(ours), metrics(theirs), strict=True):
        for key in ("loss", "auxiliary_loss", "grad_norm"):
            assert mine[key] == pytest.approx(its[key], rel=1e-5, abs=1e-7), (key, mine["step"])


@pytest.mark.parametrize(
    "model", ["switchall", *(pytest.param(model, marks=pytest.mark.slow) for model in ("switchall xl", "moa"))]
)
def test_a_replay_takes_the_choices_of_the_record_in_every_layout(prepared: Path, tmp_path: Path, model: str) -> None:
    """Choices that nobody would make prove that they were taken: losses and flips are then the same in all layouts,
    and others than without. Memory, dropouts and the regulariser are on where the model has them."""
    one, itself = tmp_path / "one", tmp_path / "itself"
    run(
        1,
        (config_of(prepared, model, "one", "train.record_routing=true"), one),
        (config_of(prepared, model, "one", f"train.replay_routing={one}"), itself),
    )
    for ours, theirs in zip(metrics(itself), metrics(one), strict=True):
        assert (ours["routing_flips"], ours["routing_flip_distance"]) == (0, 0.0)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)

    other = tmp_path / "other"
    shutil.copytree(one / "routing", other)
    changed = change_choices(other)
    for ranks in (1, 2, 4):
        layouts = [name for name in ("one", *OF_MODEL[model]) if LAYOUTS[name][0] == ranks]
        configs = [config_of(prepared, model, name, f"train.replay_routing={other}") for name in layouts]
        if layouts:
            run(ranks, *((config, tmp_path / f"other {name}") for config, name in zip(configs, layouts, strict=True)))
    whole = metrics(tmp_path / "other one")
    assert sum(line["routing_choices"] for line in whole) == changed
    assert all(line["routing_flips"] > 0 and line["routing_flip_distance"] > 0.01 for line in whole)
    assert abs(whole[-1]["loss"] - metrics(one)[-1]["loss"]) > 1e-4
    for layout in OF_MODEL[model]:
        assert_close(tmp_path / f"other {layout}", tmp_path / "other one")
        for mine, its in zip(metrics(tmp_path / f"other {layout}"), whole, strict=True):
            assert mine["routing_choices"] == its["routing_choices"]
            assert abs(mine["routing_flips"] - its["routing_flips"]) <= 2  # near ties of this very run
            assert mine["routing_flip_distance"] == pytest.approx(its["routing_flip_distance"], rel=1e-3)


@pytest.mark.parametrize("layout", ["TP2 SP PP2", pytest.param("TP2 SP EP2", marks=pytest.mark.slow)])
def test_a_record_of_many_ranks_is_that_of_one(prepared: Path, tmp_path: Path, layout: str) -> None:
    """Recorded in pieces and replayed by one process, which would have chosen (almost) the same."""
    run(4, (config_of(prepared, "switchall", layout, "train.record_routing=true"), tmp_path / "many"))
    replay = f"train.replay_routing={tmp_path / 'many'}"
    run(1, (config_of(prepared, "switchall", "one", replay), tmp_path / "one"))
    assert_close(tmp_path / "one", tmp_path / "many")
    for line in metrics(tmp_path / "one"):
        assert line["routing_flips"] <= 2 and line["routing_flip_distance"] < 1e-5
        assert line["routing_choices"] == 8 * 8 * 4 * (2 * 4 * 2 + 2)  # sequences, tokens, layers, heads, choices


def test_a_resumed_run_goes_on_recording(prepared: Path, tmp_path: Path) -> None:
    """Steps that are computed again are recorded again, what was recorded before stays, and nothing foreign goes."""
    keys = (*TWO_LAYERS, "train.record_routing=true", "checkpoint.every_steps=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record = config_of(prepared, "switchall", "one", *keys)
    run(1, (record, whole), (config_of(prepared, "switchall", "one", *keys, "train.stop_after_steps=2"), parts))
    late = parts / "routing" / "step-00000003"
    shutil.copytree(parts / "routing" / "step-00000001", late)
    (late / "rank-00007.safetensors").write_bytes(b"of a start with more ranks, superseded")
    temporary_path(late / "rank-00008.safetensors").write_bytes(b"of a rank that was killed while it wrote")
    (parts / "routing" / "notes").write_text("mine")
    run(1, (record, parts))
    assert (parts / "routing" / "notes").read_text() == "mine"
    files = {p.relative_to(whole): p.read_bytes() for p in (whole / "routing").rglob("*.*")}
    assert len(files) == STEPS + 1
    assert {p.relative_to(parts): p.read_bytes() for p in (parts / "routing").rglob("*.*")} == files


def refusals(rank: int, runs: list[tuple[Config, Path]]) -> list[str]:
    """What each run says instead of training."""
    found = []
    for config, run_dir in runs:
        with pytest.raises(UserError) as refusal:
            train(config, Sources.load(config), run_dir, torch.device("cpu"))
        assert not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text()
        found.append(str(refusal.value))
    return found


def test_a_record_that_does_not_fit_is_refused(prepared: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    run(1, (config_of(prepared, "switchall", "one", *TWO_LAYERS, "train.record_routing=true"), one))
    folder = one / "routing"
    fit, replay = str(folder), f"train.replay_routing={one}"

    def damaged(name: str, change: Any) -> str:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return f"train.replay_routing={copy}"

    def cut(copy: Path) -> None:
        path = copy / "step-00000001" / "rank-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def foreign_experts(copy: Path) -> None:
        path = copy / "step-00000001" / "rank-00000.safetensors"
        tensors = load_file(path)
        tensors["blocks.1.feedforward.statistics/index"][3, 1, 0, 1] = 200
        save_file(tensors, path)

    def half(copy: Path) -> None:
        path = copy / "step-00000001" / "rank-00000.safetensors"
        tensors = load_file(path)
        tensors = {k: v for k, v in tensors.items() if not k.startswith("blocks.0.")}
        save_file(tensors, path)

    cases = [
        ([f"train.replay_routing={tmp_path}"], "holds no record.json; name the run folder of a run with"),
        (
            [replay, "batch.global_sequences=4", "batch.micro_sequences=4"],
            f"{fit} does not fit: its global_sequences is 8, this run's 4",
        ),
        ([replay, "train.seed=6"], "does not fit: its seed is 5, this run's 6"),
        ([replay, "data.order=streams"], "does not fit: its data.order is shuffled, this run's streams"),
        ([replay, "data.shuffle_block_windows=4"], "does not fit: its data.shuffle_block_windows is 0, this run's 4"),
        ([replay, "model.sequence_length=6"], "does not fit: its sequence_length is 8, this run's 6"),
        (
            [replay, "model.num_layers=1"],
            "its router blocks.1.attention.value_statistics is [4, 3, 2], this run's None",
        ),
        (
            [replay, "model.feedforward.num_experts=6"],
            "blocks.0.feedforward.statistics is [1, 8, 2], this run's [1, 6, 2]",
        ),
        ([replay, "train.steps=6"], f"{fit} holds steps 1 to 4, but this run takes step 5 too; record more steps"),
        ([damaged("cut", cut)], "step-00000001 cannot be replayed"),
        (
            [damaged("foreign", foreign_experts)],
            "blocks.1.feedforward.statistics names experts that are not 2 different",
        ),
        ([damaged("half", half)], "blocks.0.attention.value_statistics is incomplete, so a rank did not write"),
        ([damaged("json", lambda c: (c / "record.json").write_text("[1]"))], "is not a record of choices"),
        (
            [damaged("deep", lambda c: (c / "record.json").write_text("[" * 100_000))],
            "is not a record of choices",
        ),
        ([damaged("format", lambda c: (c / "record.json").write_text('{"format": 9}'))], "is not a record of choices"),
    ]
    runs = [
        (config_of(prepared, "switchall", "one", *TWO_LAYERS, *overrides), tmp_path / str(n))
        for n, (overrides, _) in enumerate(cases)
    ]
    foreign = tmp_path / "foreign run"
    (foreign / "routing").mkdir(parents=True)
    (foreign / "routing" / "record.json").write_text('{"format": 1}')
    runs.append((config_of(prepared, "switchall", "one", "train.record_routing=true"), foreign))
    [said] = run_ranks(refusals, 1, runs)
    for line, (_, words) in zip(said[:-1], cases, strict=True):
        assert line.startswith("train.replay_routing: ") and words in line, line
    assert said[-1] == (
        f"train.record_routing: {foreign / 'routing'} holds the choices of another run; move it away, or give the run "
        f"another --run-dir"
    )
    assert (foreign / "routing" / "record.json").read_text() == '{"format": 1}'


def test_flips_of_several_steps_add_up() -> None:
    both = Flips(1000, 2, 0.5e-6).with_more(Flips(1000, 1, 0.25e-6))
    assert both.text() == (
        "2,000 choices replayed, 3 of them would have been different, the farthest 5e-07 from a tie (difference of "
        "the logits)"
    )
    assert Flips(1, 1, float("nan")).values()["routing_flip_distance"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.record_routing=true", "train.replay_routing=x"], "train.record_routing: a run with"),
        (["train.replay_routing="], "train.replay_routing: is empty; set it to the run folder of a run with train.rec"),
        (['train.replay_routing=" "'], "train.replay_routing: is empty"),
        ([*MODELS["dense"], "train.replay_routing=x"], "train.replay_routing: this model has no routers"),
    ],
)
def test_settings_that_cannot_be(prepared: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(prepared, *overrides)


def test_nothing_is_attached_unless_asked_for(prepared: Path, tmp_path: Path) -> None:
    """Off, no router has a place to ask and the numbers are those of a run without the setting."""
    record = config_of(prepared, "switchall", "one", *TWO_LAYERS, "train.record_routing=true")
    run(1, (config_of(prepared, "switchall", "one", *TWO_LAYERS), tmp_path / "off"), (record, tmp_path / "on"))
    off, on = (metrics(tmp_path / name) for name in ("off", "on"))
    assert [[line[key] for key in COMPARED] for line in off] == [[line[key] for key in COMPARED] for line in on]
    assert not (tmp_path / "off" / "routing").exists() and "routing_flips" not in off[0] | on[0]


@pytest.mark.slow
def test_full_size_with_the_choices_of_one_process_agrees_to_rounding(prepared: Path, tmp_path: Path) -> None:
    """configs/switchall_tiny.json as it is, 20 steps: what its layouts differ in are choices near a tie, and with the
    same choices nothing but rounding remains. That of the norm was 1.9e-8 in the first step and up to 3.1e-5 later,
    up to 1.2e-5 for one process against itself with other micro-batches (docs/parallelism.md), and 2.7e-3 unreplayed.
    A ReLU is a choice that nothing replays: where the input of a single hidden unit of one token has its sign by
    rounding, the first norm is off by 3.8e-6, all of it through that unit's column.
    """
    common = [
        f"data.manifest={prepared}",
        "train.stop_after_steps=20",
        "evaluate.sequences=0",
        "monitor.tensorboard=false",
    ]
    one, replay = tmp_path / "one", f"train.replay_routing={tmp_path / 'one'}"
    layouts = {
        "TP2": (2, ["parallel.tensor=2"]),
        "TP2 PP2 SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    }
    record = load_config(TINY, [*common, "train.record_routing=true", "parallel.zero=0"])
    run_ranks(train_runs, 1, [(record, one)], timeout_seconds=3000)
    for name, (ranks, keys) in layouts.items():
        config = load_config(TINY, [*common, *keys, replay])
        run_ranks(train_runs, ranks, [(config, tmp_path / name)], timeout_seconds=3000)
        assert len(metrics(tmp_path / name)) == 20
        for ours, theirs in zip(metrics(tmp_path / name), metrics(one), strict=True):
            norm_tolerance = 1e-5 if ours["step"] == 1 else 1e-4
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (name, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm_tolerance), (name, ours["step"])
            assert ours["routing_choices"] == 32 * 128 * 4 * (2 * 4 * 2 + 4)  # tokens, layers, heads and choices
            assert ours["routing_flip_distance"] < 0.01
