"""`python -m benchmarks.gpu tune`: which candidates there are, what they launch, and which one is called the best."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compiled import RECORDS
from benchmarks.compiled_records import read_records
from benchmarks.gpu import candidates as candidates_command
from benchmarks.gpu import tables, tile_compilation, timing, tune, tuned_kernels
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.command import Failed, Unavailable
from benchmarks.gpu.equality import TOLERANCE, errors, same_bits
from benchmarks.gpu.record import ROOT, read
from benchmarks.gpu.tile_compilation import Launch, Resources, launches_on_fake_cuda
from benchmarks.gpu.tile_search import MOST, Search, Tiles, candidates, pruned, text, tiles_of
from benchmarks.gpu.timing import HostClock, Work, draw
from model.kernels.triton import relative_attention, rope
from model.kernels.triton import tiles as measured_tiles
from tests.benchmarks.gpu.cases import context, entry

TINY = {search.name: search for search in tuned_kernels.searches(tiny=True)}
FULL = {search.name: search for search in tuned_kernels.searches(tiny=False)}
ROPE = next(search for name, search in TINY.items() if name.startswith("rope"))


def differences(one: Tiles, other: Tiles) -> int:
    return sum(one[name] != other[name] for name in one)


# --------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("search", FULL.values(), ids=FULL)
def test_candidates_are_near_todays_tiles_and_few(search: Search) -> None:
    found = candidates(search)
    assert found[0] == search.today and len(found) <= MOST
    assert len({text(tiles) for tiles in found}) == len(found)
    assert {differences(search.today, tiles) for tiles in found[1:]} <= {1, 2}
    assert all(tiles.keys() == search.today.keys() for tiles in found)


def test_todays_tiles_are_never_pruned_and_what_is_pruned_is_a_candidate() -> None:
    left_out = pruned(90)
    for name, rejected in left_out.items():
        search = FULL[name]
        assert text(search.today) not in rejected
        if search.today != search.own:  # the table has others since: candidates are those around them
            continue
        assert rejected.keys() <= {text(tiles) for tiles in candidates(search)}
        assert not rejected.keys() & {text(tiles) for tiles in candidates(search, rejected)}
    assert pruned(100) == {}


def given(launches: Sequence[Launch]) -> list[Any]:
    """What decides a launch beside its tensors."""
    return [
        ([a for a in launch.args if not isinstance(a, Tensor)],
         {n: v for n, v in launch.kwargs.items() if not isinstance(v, Tensor)})
        for launch in launches
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FULL if "1b" in name or "relative_attention" in name])
def test_todays_tiles_are_those_of_the_kernel_and_a_change_of_every_number_reaches_it(name: str) -> None:
    """On fake CUDA tensors, at the shipped shape; afterwards today's tiles are launched again."""
    search = FULL[name]
    one_each = {n: next(t for t in candidates(search) if t[n] != search.today[n]) for n in search.values}
    every: list[Tiles] = [{}, search.today, *one_each.values(), search.today]
    own, today, *others, again = map(given, launches_on_fake_cuda(search, every))
    assert today and own == today == again
    for changed, other in zip(one_each, others, strict=True):
        assert other != today, changed


def test_todays_tiles_of_attention_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tuned_kernels.Model("wide", 2, 19, 24, (4, 2, 16), (2, 4, 2, 256), routers=4, classes=50)
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(tuned_kernels, "current_capability", lambda now=capability: now)
        (search,) = (
            s for s in tuned_kernels.relative_attention_searches(wide) if s.name.startswith("relative_attention k ")
        )
        found = relative_attention.tiles(256, "k", capability[0])
        assert (search.own["queries"], search.own["stages"]) == (found["QUERIES"], found["num_stages"])
        assert search.own["queries"] == (32 if capability == (10, 0) else 16)


def test_todays_tiles_of_sigma_moe_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before CUDA has started, when launches of a CPU would be told of an H100."""
    for capability, registers, columns in (((9, 0), 128, 256), ((10, 0), 0, 128)):
        monkeypatch.setattr(tuned_kernels, "current_capability", lambda now=capability: now)
        own = {s.kernel: s.own for s in tuned_kernels.sigma_moe_searches(tuned_kernels.SWITCHALL_1B)}
        assert own["sigma_moe backward"]["registers"] == registers
        assert own["sigma_moe weight gradient"]["out"] == columns


def test_a_candidate_is_in_the_table_inside_and_no_longer() -> None:
    """Of tiles that no kernel could have nothing stays either."""
    other = ROPE.today | {"tile": 512}
    with pytest.raises(ValueError, match="tile 500"), tiles_of(ROPE, ROPE.today | {"tile": 500}):
        pass
    assert ROPE.today == ROPE.own
    with tiles_of(ROPE, other):
        assert ROPE.today == other
    assert ROPE.today == ROPE.own


@pytest.mark.parametrize("search", TINY.values(), ids=TINY)
def test_a_candidate_computes_the_same_and_the_same_bits_again(search: Search) -> None:
    """Of every kernel, with an entry in the table: by the interpreter, within the tolerance of `truth`."""
    inputs = draw(search.build, torch.device("cpu"), torch.bfloat16, 0)
    wanted, _ = tune.outcome(search, search.today, inputs)
    other = candidates(search)[1]
    with measured_tiles.placed([search.entry(other)]) as table:
        found, again = (tune.outcome(search, other, inputs)[0] for _ in range(2))
        assert search.entry(other).key in table and search.today == other
    assert same_bits(found, again)
    assert max(errors(found, wanted).values()) <= TOLERANCE[torch.bfloat16]


def test_every_entry_of_the_table_is_a_kernel_that_is_searched() -> None:
    """So that `compiled` can compile it, and a later search begins at it."""
    known = {(search.kernel, frozenset(search.shape.items()), search.rows) for search in FULL.values()}
    for one in measured_tiles.load().values():
        assert (one.kernel, frozenset(one.shape.items()), one.rows) in known, one
        assert one.dtype == "bf16"


# ---------------------------------------------------------------------------------------------------------- selection


class Readings(HostClock):
    """Milliseconds by the candidate that is timed: each `capture` of today's and of the others takes the next one."""

    def __init__(self, milliseconds: Sequence[float]) -> None:
        self._left = [ms for ms in milliseconds for _ in range(2)]  # two sets of inputs
        self._of: dict[int, float] = {}

    def capture(self, work: Work) -> Work:
        work()
        replay: Work = lambda: None  # noqa: E731
        self._of[id(replay)] = self._left.pop(0)
        self._kept = [*getattr(self, "_kept", ()), replay]
        return replay

    def timed(self, replay: Work) -> Callable[[], float]:
        return lambda: self._of[id(replay)]


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Search:
    """RoPE, whose op is cheap to interpret, with today's tiles and three others."""
    monkeypatch.setattr(tune, "TINY_CANDIDATES", 4)
    return dataclasses.replace(ROPE, values={"tile": (512, 1024, 2048, 4096)})


def compiled(*found: Resources) -> tune.Resourceful:
    return lambda context, search, tried: list(found)


FINE = Resources(registers=32, shared_bytes=1024)


def test_the_fastest_candidate_is_the_best(four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "clock_of", lambda _: Readings([4.0, 5.0, 2.8, 3.5, 4.5, 3.0]))
    found = tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))
    assert [row["tiles"]["tile"] for row in found["candidates"]] == [2048, 512, 1024, 4096]
    assert [row["ms"] for row in found["candidates"]] == [4.0, 5.0, 2.8, 3.5]
    assert found["today"] == {"tiles": four.today, "ms": 4.0} and found["today_again"]["ms"] == 4.5
    # The worse of its two times.
    assert found["best"] == {"tiles": four.today | {"tile": 1024}, "ms": 3.0} and found["best_again"]["ms"] == 3.0
    assert (found["gain_percent"], found["rejected"]) == (25.0, 0)
    assert all(row["same_bits"] and row["error"] == 0.0 for row in found["candidates"])


def test_a_slow_first_round_of_todays_tiles_is_no_gain(
    four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "clock_of", lambda _: Readings([4.0, 5.0, 3.0, 3.5, 2.9, 3.0]))
    found = tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))
    assert found["best"] == found["today"] == {"tiles": four.today, "ms": 2.9} and found["gain_percent"] == 0.0


def test_a_lucky_round_of_a_candidate_is_no_gain(four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "clock_of", lambda _: Readings([4.0, 5.0, 3.0, 4.0, 4.0, 4.1]))
    found = tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))
    assert found["best"] == found["today"] == {"tiles": four.today, "ms": 4.0} and found["gain_percent"] == 0.0


def test_a_candidate_that_does_not_work_again_is_no_gain() -> None:
    rows = [{"tiles": {"tile": 1}, "ms": 4.0}, {"tiles": {"tile": 2}, "ms": 3.0}]
    found = tune.chosen(rows, {"ms": 4.1}, {"rejected": "another result: output 0 differs"})
    assert found["best"] == found["today"] == rows[0] and found["gain_percent"] == 0.0


def test_what_spills_or_does_not_fit_is_not_timed(
    four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spills, too_large = Resources(registers=255, stack_bytes=8), Resources(registers=64, shared_bytes=240_000)
    monkeypatch.setattr(tune, "clock_of", lambda _: Readings([4.0, 3.0, 4.0, 3.0]))
    found = tune.compute(context(tmp_path), search=four, compiled=compiled(spills, spills, too_large, FINE))
    said = [row.get("rejected") for row in found["candidates"]]
    assert said == [None, "8 bytes of stack per thread", "240000 bytes of shared memory, 232448 fit", None]
    assert found["best"]["tiles"]["tile"] == 4096 and found["rejected"] == 2
    assert Resources(registers=128).rejected(90, 16) == "" and Resources(error="no").rejected(90, 4)
    assert Resources(registers=130).rejected(90, 16) == "130 registers per thread in 16 warps"


def test_a_candidate_with_another_result_is_rejected(
    four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that turns the other way, and one that raises."""
    launch = rope.launch

    def broken(*tensors: Tensor, direction: float) -> None:
        tile = ROPE.today["tile"]
        launch(*tensors, direction=1 / 0 if tile == 4096 else -direction if tile == 512 else direction)

    monkeypatch.setattr(rope, "launch", broken)
    monkeypatch.setattr(tune, "clock_of", lambda _: Readings([4.0, 3.0, 4.0, 3.0]))
    found = tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))
    said = [row.get("rejected", "") for row in found["candidates"]]
    assert said[1].startswith("another result: output") and said[3].startswith("ZeroDivisionError")
    assert not said[0] + said[2] and found["best"]["tiles"]["tile"] == 1024


@pytest.mark.parametrize(
    "kind, off, is_right",
    [
        ("errors", 0.019, True),
        ("errors", 0.021, False),
        ("errors", float("nan"), False),
        ("row_errors", 0.19, True),  # where the whole tensor is near enough
        ("row_errors", 0.21, False),
        ("row_errors", float("nan"), False),
    ],
)
def test_how_far_a_candidate_may_be_off(
    kind: str, off: float, is_right: bool, four: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(four.build, torch.device("cpu"), torch.bfloat16, 0)
    wanted, _ = tune.outcome(four, four.today, inputs)
    monkeypatch.setattr(tune, kind, lambda *_: {"output 0": 0.0, "output 1": off})
    found = tune.timed(four, four.today, [inputs], wanted, HostClock(), 1)
    words = "another result: output 1" if kind == "errors" else "another result: a row of output 1"
    assert ("ms" in found) is is_right and (is_right or found["rejected"].startswith(words))
    if kind == "row_errors":  # not of a router: a near tie makes another row of its gradient
        of_a_router = dataclasses.replace(inputs, case=inputs.case._replace(op="route"))
        assert "ms" in tune.timed(four, four.today, [of_a_router], wanted, HostClock(), 1)


def test_a_candidate_is_timed_on_every_set_of_inputs_by_one_phase_alone(
    four: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE's kernel turns back in the backward pass, too: that is no launch of the forward pass."""
    sets = [draw(four.build, torch.device("cpu"), torch.bfloat16, seed) for seed in range(3)]
    wanted, launches = tune.outcome(four, four.today, sets[0])
    assert len(launches) == 1
    replayed: list[Launch] = []
    monkeypatch.setattr(
        tune, "measure", lambda clock, works, rounds: [work() for work in works] and timing.times([1.0])
    )
    monkeypatch.setattr(tune, "replay", replayed.extend)
    assert tune.timed(four, four.today, sets, wanted, HostClock(), 1)["ms"] == 1.0
    read = [next(a for a in launch.args if isinstance(a, Tensor)) for launch in replayed]
    assert [torch.equal(one, inputs.tensors["q"]) for one, inputs in zip(read, sets, strict=True)] == [True] * 3


def test_todays_tiles_that_fail_at_the_end_fail_the_part(
    four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = iter([{"ms": 4.0}, {"ms": 3.0}, {"ms": 5.0}, {"ms": 6.0}, {"rejected": "it died"}])
    monkeypatch.setattr(tune, "timed", lambda *_: next(rows))
    with pytest.raises(Failed, match="today's tiles: it died"):
        tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))


def test_todays_tiles_that_do_not_work_fail_the_part(
    four: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "measure", lambda *_: 1 / 0)
    with pytest.raises(Failed, match="today's tiles: ZeroDivisionError") as failure:
        tune.compute(context(tmp_path), search=four, compiled=compiled(FINE, FINE, FINE, FINE))
    assert len(failure.value.result["candidates"]) == 4


def test_a_part_whose_time_is_over_is_tried_again(four: Search, tmp_path: Path) -> None:
    """`Unavailable`: recorded as skipped, which is not done."""
    with pytest.raises(Unavailable, match="the time was over after 0 of 4 candidates"):
        tune.compute(context(tmp_path, remaining=1.0), search=four, compiled=compiled(FINE, FINE, FINE, FINE))


def test_the_table_of_tiles() -> None:
    result: dict[str, Any] = {
        "candidates": [{}, {}, {}],
        "today": {"tiles": {"rows": 64, "warps": 4}, "ms": 2.0},
        "best": {"tiles": {"rows": 128, "warps": 4}, "ms": 1.5},
        "gain_percent": 25.0,
        "rejected": 1,
    }
    found = entry("sum 1b N=1", **result)
    head, row = tables.tile_rows([found, dataclasses.replace(found, status="failed")])
    assert head[:4] == ("kernel, shape", "today", "best", "gain")
    assert row == ("sum 1b N=1", "rows 64, warps 4: 2 ms", "rows 128, warps 4: 1.5 ms", "25.0%", "3, 1")
    assert tables.headline(found) == "25 % less time than today's tiles"


# ----------------------------------------------------------------------------------------------------------- compiler


class FakeCompiler:
    """Rejects candidates of one row."""

    def __init__(self, architecture: int, processes: int) -> None:
        self.tried: dict[str, Sequence[Tiles]] = {}

    def begin(self, search: Search, tried: Sequence[Tiles]) -> None:
        self.tried[search.name] = tried

    def resources(self, search: Search, seconds: float) -> list[Resources]:
        return [Resources(stack_bytes=16 if t["tokens"] == 1 else 0) for t in self.tried[search.name]]

    def stop(self) -> None:
        self.tried.clear()


@pytest.mark.usefixtures("own_tiles")
def test_candidates_that_spill_are_pruned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pruned.json"
    path.write_text(json.dumps({"architecture": 90, "parts": {"another": {"rows 1": "it spills"}}}))
    monkeypatch.setattr(tile_compilation, "Compiler", FakeCompiler)
    monkeypatch.setattr(candidates_command, "PRUNED", path)
    monkeypatch.setattr(candidates_command, "pruned", lambda architecture: pruned(architecture, path))
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["candidates", "--only", "sigma_moe sum 1b", "--prune"]) == 0
    output = capsys.readouterr().out
    assert "16 bytes of stack per thread" in output
    found = json.loads(path.read_text())["parts"]
    (name,) = (name for name in FULL if name.startswith("sigma_moe sum 1b"))
    spilling = [text(tiles) for tiles in candidates(FULL[name]) if tiles["tokens"] == 1]
    assert found == {"another": {"rows 1": "it spills"}, name: dict.fromkeys(spilling, "16 bytes of stack per thread")}
    assert main(["candidates", "--only", "nothing"]) == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["candidates"]) == 2


def test_of_several_kernels_the_largest_need_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each number by itself."""

    class Compiled:
        def __init__(self, usage: tuple[int, int], shared: int) -> None:
            self.asm, self.metadata = {"cubin": usage}, SimpleNamespace(shared=shared)

    needs = iter([Compiled((32, 0), 4096), Compiled((16, 8), 1024)])
    kernel = SimpleNamespace(run=lambda *args, **options: next(needs))
    launch = Launch(kernel, (1,), (), {})
    monkeypatch.setattr(tile_compilation, "launches_on_fake_cuda", lambda search, every: [[launch, launch]])
    monkeypatch.setattr(tile_compilation, "_usage", lambda cubin: {"REG": cubin[0], "STACK": cubin[1]})
    found = tile_compilation.compile_tiles(ROPE, ROPE.today, 90)
    assert found == Resources(registers=32, stack_bytes=8, shared_bytes=4096)


def test_parts_that_are_left_are_compiled_in_their_order_while_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the first that is computed on, without those that are recorded, all at once."""
    made: list[FakeCompiler] = []

    def compiler(architecture: int) -> FakeCompiler:
        assert architecture == 90
        made.append(FakeCompiler(architecture, 1))
        return made[-1]

    monkeypatch.setattr(tune, "Compiler", compiler)
    sums = [search for name, search in FULL.items() if name.startswith("sigma_moe sum")]
    first, last = (search for name, search in FULL.items() if name.startswith("norm forward"))
    searches, measured = [first, *sums, last], {last.name: {"gain_percent": 0.0}}
    given = dataclasses.replace(context(tmp_path), tiny=False, measured=measured)
    ahead = tune._Ahead(searches)
    for search in sums:
        found = ahead(given, search, tune.tried_of(given, search))
        assert len(found) == len(tune.tried_of(given, search))
    assert len(made) == 1 and list(made[0].tried) == [search.name for search in sums]


PROGRAM = """
import dataclasses, json
from benchmarks.gpu.tile_compilation import compile_tiles
from benchmarks.gpu.tuned_kernels import searches
for search in searches(tiny=False):
    if search.name.startswith(("sigma_moe sum 1b", "sigma_moe weight gradient 1b")):
        print(json.dumps([search.name, dataclasses.asdict(compile_tiles(search, search.today, 90))]))
"""
RECORDED = {
    "sigma_moe sum 1b": ("sigma_moe sum 1b bf16",),
    "sigma_moe weight gradient 1b": ("sigma_moe grad_up 1b bf16", "sigma_moe grad_down 1b bf16"),
}
"""Beginning of a part -> the cases of benchmarks/compiled.csv that its launches are."""


@pytest.mark.slow
def test_what_a_candidate_needs_is_what_compiled_csv_says(tmp_path: Path) -> None:
    """The launches on fake CUDA tensors, compiled, beside the cases that are written by hand."""
    triton = pytest.importorskip("triton")
    records = read_records(RECORDS).get(triton.__version__)
    if not records:
        pytest.skip(f"benchmarks/compiled.csv has nothing of Triton {triton.__version__}")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == len(RECORDED)
    for beginning, names in RECORDED.items():
        (needs,) = (needs for name, needs in found.items() if name.startswith(beginning))
        cases = [r for r in records.values() if r.name in names and r.architecture == 90]
        assert len(cases) == len(names) and needs["error"] == ""
        assert needs["registers"] == max(case.registers for case in cases), beginning
        assert needs["stack_bytes"] == max(case.stack_bytes for case in cases)
        assert needs["shared_bytes"] == max(case.shared_bytes for case in cases)


@pytest.mark.slow
def test_every_part_on_the_cpu(tmp_path: Path) -> None:
    words = ["tune", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--seconds", "3000"]
    assert main(words) == 0
    entries = read(tmp_path / "cpu" / "tune.jsonl")
    assert {entry.status for entry in entries} == {"passed"} and {entry.part for entry in entries} == set(TINY)
    assert all(len(entry.result["candidates"]) == 2 for entry in entries)
    assert all("rejected" not in row for entry in entries for row in entry.result["candidates"])
