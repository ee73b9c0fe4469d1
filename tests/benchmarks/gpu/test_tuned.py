"""Tiles that `tune` found: measured in a whole micro-step and a block beside today's, and written into the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compiled, compiled_entries
from benchmarks.compiled import main as compile_command
from benchmarks.compiled_records import read_records
from benchmarks.gpu import block, models, tables, tuned_kernels, tuned_step, winners
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.command import Context, Failed, Unavailable
from benchmarks.gpu.equality import errors
from benchmarks.gpu.record import Identity, Record, identity
from benchmarks.gpu.tile_compilation import Resources
from benchmarks.gpu.tile_search import Search
from benchmarks.gpu.tuned_step import compared
from model.kernels.triton import tiles
from model.language_model import build_on_meta
from tests.benchmarks.gpu import cases
from tests.benchmarks.gpu.cases import CPU, MEASURED, entry

pytestmark = pytest.mark.usefixtures("own_tiles")
WIDTH = models.load("tiny").d_model
NORM: dict[str, Any] = {
    "kernel": "norm forward",
    "capability": "9.0",
    "dtype": "bf16",
    "shape": {"d": WIDTH},
    "rows": 0,
}
"""Which the tiny model launches."""
SHAPE = {"V": 50, "holds_row": 1}
SOFTMAX = NORM | {"kernel": "softmax", "shape": SHAPE, "tiles": {"block": 64, "warps": 4}}
"""Which it does not."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHORT", {"sequence_length": 8})


def context(folder: Path) -> Context:
    return cases.context(folder, **MEASURED)


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own backends, in a tenth of the time."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda config, device, dtype, backend: build(config, device, dtype))


def result(entry: dict[str, Any], best: dict[str, int], gain: float) -> dict[str, Any]:
    """What a part of `tune` records, as far as it is read."""
    return {
        "entry": entry,
        "today": {"tiles": entry["tiles"], "ms": 2.0},
        "best": {"tiles": best, "ms": round(2.0 * (1 - gain / 100), 3)},
        "gain_percent": gain,
    }


def recorded(folder: Path, *results: dict[str, Any], on: Identity | None = None, status: str = "passed") -> None:
    book = Record(folder, "tune", on or identity("cpu"))
    for one in results:
        book.append(f"{one['entry']['kernel']} {one['entry']['shape']}", status, 1.0, one)


FASTER = result(NORM | {"tiles": {"warps": 1}}, {"warps": 2}, 10.0)


def test_what_is_a_winner(tmp_path: Path) -> None:
    """1% or more less time, of a part that passed."""
    slow = result(SOFTMAX, {"block": 128, "warps": 4}, 0.9)
    recorded(tmp_path, FASTER, slow)
    (found,) = winners.of_here(context(tmp_path))
    assert (found.kernel, found.tiles, found.capability) == ("norm forward", {"warps": 2}, (9, 0))
    passed = list(Record(tmp_path, "tune", identity("cpu")).done().values())
    assert not winners.winners([dataclasses.replace(one, status="failed") for one in passed])
    assert len(winners.winners(passed, 10.0)) == 1 and not winners.winners(passed, 10.1)
    assert found.measured["before"] == "warps 1" and (found.measured["ms"], found.measured["before_ms"]) == (1.8, 2.0)


def test_without_winners_there_is_nothing_to_time(tmp_path: Path) -> None:
    step: dict[str, Any] = {"name": "tiny", "sequences": 1, "kind": "tuned"}
    with pytest.raises(Unavailable, match="tune has recorded nothing for this card and these sources"):
        tuned_step.compute(context(tmp_path), **step)
    other = Identity(**vars(identity("cpu")) | {"sources": "another"})
    recorded(tmp_path, FASTER, on=other)
    with pytest.raises(Unavailable, match="tune has recorded nothing"):
        block.compute(context(tmp_path), name="tiny", is_tuned=True)
    recorded(tmp_path, result(SOFTMAX, SOFTMAX["tiles"], 0.0))
    with pytest.raises(Unavailable, match="today's tiles are the fastest, in all 1 parts"):
        tuned_step.compute(context(tmp_path), **step)


@pytest.mark.slow  # the fast one: test_a_block_with_the_winners_beside_todays
def test_a_micro_step_with_the_winners_beside_todays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winners are in place for one of the two in every call, the first, the recorded, the timed, the profiled."""
    recorded(tmp_path, FASTER, result(SOFTMAX, {"block": 128, "warps": 4}, 5.0))
    calls: dict[int, list[bool]] = {}

    class Seen(tuned_step.Step):
        def __call__(self) -> None:
            tuned = tiles.measured("norm forward", torch.bfloat16, d=WIDTH) is not None
            calls.setdefault(id(self), []).append(tuned)
            super().__call__()

    monkeypatch.setattr(tuned_step, "Step", Seen)
    other = NORM | {"kernel": "norm backward", "tiles": {"warps": 2, "resident": 1024}}
    with tiles.placed([tiles.entry_of(other)]):  # which the table has already: both micro-steps launch them
        found = tuned_step.compute(context(tmp_path), name="tiny", sequences=1, kind="tuned")
    assert found["tiles"] == [f"norm forward d={WIDTH}: warps 2"] and found["not_launched"] == ["softmax"]
    assert found["errors"]["error"] <= found["errors"]["limit"] and found["errors"]["limit"] >= 2e-2
    assert found["ratio"] == pytest.approx(found["wall_ms"] / found["today"]["wall_ms"], rel=1e-3)
    assert found["tokens"] == 8 and found["launches"] > 10
    assert sorted(calls.values()) == [[False], [False] * 5, [True] * 6]
    head, row, today = tables.step_rows([entry("micro-step tiny tuned 1", **found)])
    assert row[0] == "tiny tuned 1" and today[0] == "tiny tuned 1: with today's tiles"
    assert len(head) == len(row) == len(today)


def test_todays_tiles_are_timed_beside_the_winners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_interpreter: None
) -> None:
    """Which are in the table while the tuned model is at work, and no longer; its routers choose what today's chose."""
    recorded(tmp_path, FASTER)
    timed: list[tuple[Any, Any]] = []
    chosen: list[bool] = []
    choosing = tuned_step.choosing

    def now() -> Any:
        return tiles.measured("norm forward", torch.bfloat16, d=WIDTH)

    def noting(choices: list[torch.Tensor], *, again: bool = False) -> Any:
        chosen.append(again)
        return choosing(choices, again=again)

    def times(step: Any) -> tuple[float, float]:
        timed.append((step, now()))
        return (1.0, 0.5) if now() is None else (0.8, 0.25)

    monkeypatch.setattr(tuned_step, "choosing", noting)
    monkeypatch.setattr(tuned_step.Step, "timed", times)
    times_found = tuned_step.compute(context(tmp_path), name="tiny", sequences=1, kind="tuned")
    assert (times_found["ratio"], times_found["wall_ms"], times_found["host_ms"]) == (0.8, 800.0, 250.0)
    assert times_found["today"]["wall_ms"] == 1000.0
    won = {"warps": 2}
    assert [found for _, found in timed] == [*[None] * 2, *[won] * 2, *[None, won] * 2, won]  # the profiler's last
    today, tuned = timed[0][0], timed[2][0]
    assert today is not tuned and [step for step, _ in timed[4:8]] == [today, tuned] * 2
    assert chosen == [False, True, True]
    monkeypatch.setattr(block, "_layers", lambda *_: {"tiles": now()})
    found = block.compute(context(tmp_path), name="tiny", backend="triton", is_tuned=True)
    assert [found[kind]["tiles"] for kind in ("model", "dense", "today")] == [won, None, None]


def test_tiles_that_compute_something_else_fail_with_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_interpreter: None
) -> None:
    recorded(tmp_path, FASTER)
    outcome, calls = tuned_step.outcome, []

    def wrong(step: Any) -> dict[str, torch.Tensor]:
        calls.append(step)
        found = outcome(step)
        if len(calls) == 3:  # of today's tiles, of the nudged model, of the winners
            found["final_norm.weight"] *= 3
        return found

    monkeypatch.setattr(tuned_step, "outcome", wrong)
    with pytest.raises(Failed, match=r"final_norm\.weight is off by 2\.0e") as failure:
        tuned_step.compute(context(tmp_path), name="tiny", sequences=1, kind="tuned")
    assert failure.value.result["ratio"] > 0 and failure.value.result["errors"]["worst"] == "final_norm.weight"


def test_how_far_a_gradient_may_be_off() -> None:
    """By the tolerance of bf16, or by twice what rounding the embedding elsewhere does; a NaN never passes."""
    one = torch.ones(4)
    wanted = {"loss": one[0], "a": one, "b": one}
    noise = {"loss": one[0] * 1.5, "a": one * 1.05, "b": one}
    assert compared(wanted | {"a": one * 1.09, "b": one * 1.019}, wanted, noise)[1] == []
    found, wrong = compared(wanted | {"a": one * 1.11}, wanted, noise)
    assert wrong == ["a is off by 1.1e-01, more than 1.0e-01"] and found["worst"] == "a"
    assert compared(wanted | {"b": one * 1.03}, wanted, noise)[1] == ["b is off by 3.0e-02, more than 2.0e-02"]
    assert len(compared(wanted | {"loss": one[0] * 1.03}, wanted, noise)[1]) == 1
    found, wrong = compared(wanted | {"b": one * float("nan")}, wanted, noise)
    assert len(wrong) == 1 and found["worst"] == "b"


def test_routers_choose_what_they_chose_before() -> None:
    """Where roundings are others, too: gradients are nearer to each other then."""
    config = models.load("tiny", num_layers=2, sequence_length=64)
    choices: list[torch.Tensor] = []
    with tuned_step.choosing(choices):
        wanted = tuned_step.outcome(tuned_step.Step(config, CPU, 1))
    plain = tuned_step.outcome(tuned_step.Step(config, CPU, 1))
    assert len(choices) == 2 * config.num_layers
    with tuned_step.choosing(choices, again=True):
        again = tuned_step.outcome(tuned_step.Step(config, CPU, 1))
    assert all(torch.equal(wanted[name], plain[name]) and torch.equal(wanted[name], again[name]) for name in wanted)
    others = [(index + 1) % (int(index.max()) + 1) for index in choices]
    with tuned_step.choosing(others, again=True):
        other = tuned_step.outcome(tuned_step.Step(config, CPU, 1))
    assert errors(other, wanted)["blocks.0.feedforward.up_experts"] > 0.1
    noted: list[torch.Tensor] = []
    with tuned_step.choosing(noted):
        free = errors(tuned_step.outcome(tuned_step.nudged(tuned_step.Step(config, CPU, 1))), wanted)
    with tuned_step.choosing(choices, again=True):
        bound = errors(tuned_step.outcome(tuned_step.nudged(tuned_step.Step(config, CPU, 1))), wanted)
    assert not all(torch.equal(one, chosen) for one, chosen in zip(noted, choices, strict=True))
    assert max(bound.values()) < 0.5 * max(free.values())


def test_a_nudged_embedding_differs_in_the_last_bit() -> None:
    """And in no other parameter."""
    config = models.load("tiny", num_layers=1, sequence_length=8)
    plain, other = (tuned_step.Step(config, CPU, 1) for _ in range(2))
    before = {name: p.clone() for name, p in other.model.named_parameters()}
    after = dict(tuned_step.nudged(other).model.named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == {name for name in after if name.startswith("embedding.")}
    (name,) = changed
    assert torch.equal(before[name], dict(plain.model.named_parameters())[name])  # both were drawn alike
    assert (after[name].view(torch.int16) ^ before[name].view(torch.int16) == 1).all()
    assert sum(p.numel() for p in after.values()) == sum(p.numel() for p in build_on_meta(config).parameters())


def test_a_block_with_the_winners_beside_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_interpreter: None
) -> None:
    recorded(tmp_path, FASTER)
    timed, seen = block.timed, []  # type: Any, list[bool]

    def noting(*args: Any) -> Any:
        seen.append(tiles.measured("norm forward", torch.bfloat16, d=WIDTH) is not None)
        return timed(*args)

    monkeypatch.setattr(block, "timed", noting)
    found = block.compute(context(tmp_path), name="tiny", backend="triton", is_tuned=True)
    assert found["model"]["parameters"] == found["today"]["parameters"] and found["today"]["block"]["ms"] > 0
    assert seen == [True, True, False, False, False, False]  # block and attention of the model, of dense, of today
    assert found["tiles"] == [f"norm forward d={WIDTH}: warps 2"]
    rows = tables.block_rows([entry("block tuned tiny", **found)])[1:]
    assert [row[:2] for row in rows] == [("tuned tiny", kind) for kind in ("model", "dense", "today")]


# -------------------------------------------------------------------------------------------------------------- apply


def test_winners_are_written_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each card its newest sources; what was there of other launches stays; a CPU's are no measurements."""
    path = tmp_path / "tiles.json"
    kept = NORM | {"shape": {"d": 1024}, "tiles": {"warps": 8}, "measured": {}}
    path.write_text(json.dumps([kept, NORM | {"tiles": {"warps": 4}}]))
    monkeypatch.setattr(tiles, "FILE", path)
    card = Identity(card="NVIDIA H200", driver="580", python="3", torch="2", cuda="13", triton="3.6.0", sources="old")
    recorded(tmp_path, result(SOFTMAX, {"block": 32, "warps": 4}, 50.0), on=card)
    recorded(tmp_path, FASTER, on=Identity(**vars(card) | {"sources": "new"}))
    recorded(tmp_path, result(SOFTMAX, {"block": 128, "warps": 4}, 50.0))
    assert main(["apply", "--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith(": warps 2: 1.8 ms, 2 before") and "tiles.json: 2 entries" in output
    written = json.loads(path.read_text())
    assert written[0] == kept and written[1]["tiles"] == {"warps": 2}
    assert written[1]["measured"]["card"] == "NVIDIA H200" and written[1]["measured"]["triton"] == "3.6.0"
    assert main(["apply", "--results", str(tmp_path)]) == 0  # again, nothing changes
    assert json.loads(path.read_text()) == written and len(capsys.readouterr().out.splitlines()) == 1
    assert main(["apply", "--results", str(tmp_path), "--least-gain", "20"]) == 0
    assert json.loads(path.read_text()) == written


# ----------------------------------------------------------------------------------------------------------- compiled


def test_entries_of_the_table_are_compiled_for_their_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at the shape of its search; what spills, does not fit, or belongs to no search is said."""
    search = next(s for s in tuned_kernels.searches(tiny=False) if s.name.startswith("sigma_moe sum 1b"))
    good = search.entry(search.own | {"tokens": 4})
    spills = dataclasses.replace(search.entry(search.own | {"tokens": 8}), capability=(10, 0))
    strange = dataclasses.replace(good, shape={"d": 3, "rows_each": 3})
    asked: list[tuple[str, int, int]] = []

    def needs(tried: list[tuple[Search, dict[str, int]]], architecture: int) -> list[Resources]:
        asked.extend((search.name, tiles["tokens"], architecture) for search, tiles in tried)
        return [Resources(registers=32, stack_bytes=16 if tiles["tokens"] == 8 else 0) for _, tiles in tried]

    monkeypatch.setattr(compiled_entries, "compiled", needs)
    monkeypatch.setattr(compiled_entries, "load", lambda: tiles.Table([good, spills, strange]))
    count, wrong = compiled_entries.check([90, 100], "")
    assert asked == [(search.name, 4, 90), (search.name, 8, 100)] and count == 3
    assert [why.split(": ")[-1] for why in wrong] == [
        "no search of benchmarks/gpu/tuned_kernels.py has this kernel and shape",
        "16 bytes of stack per thread",
    ]
    assert compiled_entries.check([90], "") == (2, wrong[:1]) and compiled_entries.check([90], "sum 1b") == (1, [])
    assert compiled_entries.check([80], "") == (0, [])


def test_the_gate_of_machine_code_asks_for_the_entries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled_entries, "check", lambda architectures, only: (2, [f"{architectures} {only}"]))
    # No kernel module is imported first here: without the interpreter it would stay compiled for all tests behind.
    monkeypatch.setattr(compiled, "case_modules", list)
    monkeypatch.delenv("TRITON_INTERPRET")
    (version, records), *_ = read_records(compiled.RECORDS).items()
    key, one = next((key, one) for key, one in records.items() if one.architecture == 90)
    job = compiled.Job("", 0, "", one.name, 90, key, False, False)
    gate = compiled.Gate(version, version, [job], {key: one}, {key: one})
    monkeypatch.setattr(compiled.Gate, "of", lambda *_: gate)
    words = ["--arch", "90"]
    assert compile_command(words) == 0 and compile_command(["--check", *words]) == 1
    assert "2 measured tiles compiled, 1 not as they should be" in capsys.readouterr().err
    monkeypatch.setattr(compiled_entries, "check", lambda *_: (2, []))
    assert compile_command(["--check", *words]) == 0
    monkeypatch.setattr(compiled_entries, "check", lambda *_: 1 / 0)
    assert compile_command(["--check", "--representative", *words]) == 0  # a part has none of them
