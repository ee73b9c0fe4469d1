"""The search beside a ranking by brute force, and the file that it writes."""

from __future__ import annotations

import errno
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from common.errors import ConfigError, UserError
from common.units import GIB
from pretrain.cli import train
from pretrain.cli.plan import main
from pretrain.cli.plan_search import as_json, lines_of, settings
from pretrain.config.graph_rules import takes_graphs
from pretrain.config.loading import load_config, parse_config, to_json
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.planning import fit as planning
from pretrain.planning import layout_plan, search
from pretrain.planning.layout_file import chosen_tree, write_config
from pretrain.planning.layout_plan import StageMemory, StepTime
from pretrain.planning.links import Collective
from pretrain.planning.machine import Machine, MachineOptions, machine
from pretrain.planning.measured import RESULTS, Measurements, measurements
from pretrain.planning.memory import USABLE
from pretrain.planning.paces import paces, why_no_time
from pretrain.planning.search import Found, Layout
from pretrain.planning.step_time import Pace, Terms, blocks_of_stages
from pretrain.planning.stops import CannotRehearse, StepStops
from tests.pretrain.planning.test_fit import by_stage, whole
from tests.pretrain.runs import small_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
ONE_BILLION = CONFIGS / "switchall_1b.json"
NOWHERE = Path("no records")
SMALL = ("model.num_layers=2", "batch.global_sequences=8")
"""Of the 1B model: a space of a few hundred layouts on four GPUs."""


def estimate(config: Config, num_ranks: int, device_type: str, *, stage: int = 0) -> StageMemory:
    """In place of a trace: what divides less or keeps more needs more."""
    parallel, kept = config.parallel, {"none": 9.0, "selective": 5.0, "full": 2.0}[config.train.recompute]
    shared = 30.0 / parallel.zero if parallel.zero else 60.0
    divided = parallel.tensor * parallel.pipeline
    total = (shared + kept * config.batch.micro_sequences * (0.8 if parallel.sequence else 1)) / divided + stage
    return whole(total, stage)


def collectives(config: Config, num_ranks: int, stage: int) -> list[Collective]:
    parallel = config.parallel
    data = num_ranks // (parallel.tensor * parallel.pipeline)
    found = [Collective("all_reduce", "data", data, 4 * 10**8 // parallel.tensor, "update")]
    found += [Collective("all_gather", "data", data, 10**8, "micro-step", 2)] * (parallel.zero == 3)
    found += [Collective("all_reduce", "tensor", parallel.tensor, 10**8, "micro-step", 16)] * (parallel.tensor > 1)
    found += [Collective("all_to_all", "expert", parallel.expert, 10**8, "micro-step", 8)] * (parallel.expert > 1)
    return found


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_plan, "stage_memories", by_stage(estimate))
    monkeypatch.setattr(layout_plan, "rough_collectives", collectives)


def h100(gpus: int) -> Machine:
    return machine(MachineOptions(gpu="h100-80gb", gpus=gpus))


def by_brute_force(config: Config, found: Machine) -> list[tuple[float, int, Layout]]:
    """Time, bytes and layout of all legal layouts, the best first: through JSON and the public rules."""
    sizes = range(1, found.num_gpus + 1)
    ranked = []
    for layout in itertools.starmap(
        Layout,
        itertools.product(sizes, sizes, sizes, range(4), (False, True), ("none", "selective", "full"), range(1, 9)),
    ):
        if found.num_gpus % (layout.tensor * layout.pipeline):
            continue
        tree: dict[str, Any] = to_json(config)
        for key, value in layout.overrides().items():
            section, name = key.split(".")
            tree[section][name] = value
        try:
            candidate = parse_config(tree)
            check_ranks(candidate, found.num_gpus)
        except ConfigError:
            continue
        needed = max(memory.total for memory in layout_plan.stage_memories(candidate, found))
        time = layout_plan.step_time(candidate, found, Measurements()).middle
        ranked.append((layout_plan.rounded(time), needed, layout))
    return sorted(ranked)


def test_the_best_are_those_of_brute_force() -> None:
    config, found = load_config(ONE_BILLION, SMALL), h100(2)
    ranked = by_brute_force(config, found)
    for memory_gib in (75.0, 40.0, 25.0):  # the fastest fit, some of them do not, few of any kind do
        small = machine(MachineOptions(gpu="h100-80gb", gpus=2, memory_gib=memory_gib))
        expected = [layout for _, needed, layout in ranked if needed <= 0.9 * memory_gib * GIB]
        told: list[tuple[str, int, int]] = []
        report = search.search(config, small, results=NOWHERE, progress=lambda *said: told.append(said))  # noqa: B023
        assert [one.layout for one in report.best] == expected[: search.SHOWN]
        # Everything is accounted for, and not all of it was traced.
        assert report.layouts == len(ranked) + sum(count for count, _ in report.refused.values())
        assert len(report.best) + sum(report.excluded.values()) == len(ranked)
        assert len(report.best) <= report.traced < len(ranked)
        assert told == sorted(told) and told[-1][1] <= told[-1][2] == search.SHOWN


@pytest.mark.parametrize(
    "stages, blocks, decisive",
    [
        (1, [18], [0]),
        (4, [5, 5, 6, 2], [0, 1, 2, 3]),
        (7, [2, 3, 3, 3, 3, 3, 1], [0, 1, 6]),
        (8, [2, 2, 2, 2, 3, 3, 3, 1], [0, 1, 4, 7]),
    ],
)
def test_stages_between_the_ends_with_no_more_blocks_than_an_earlier_one_are_not_rehearsed(
    stages: int, blocks: list[int], decisive: list[int]
) -> None:
    config = load_config(ONE_BILLION, [f"parallel.pipeline={stages}"])
    assert blocks_of_stages(config) == blocks and layout_plan.decisive_stages(config) == decisive


@pytest.mark.parametrize(("gpu", "results"), [("h100-80gb", NOWHERE), ("h200", RESULTS)])
def test_every_layout_has_the_time_that_fit_prints(gpu: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that cannot have CUDA graphs, which the run's own layout has."""
    monkeypatch.setattr(search, "SHOWN", 1000)
    monkeypatch.setattr(search, "MOST_REHEARSED", 1000)
    monkeypatch.setattr(
        planning, "rehearsed_collectives", lambda config, ranks, stage, kind: collectives(config, ranks, stage)
    )
    found = machine(MachineOptions(gpu=gpu, gpus=2))
    measured = {(found.device.name, results): measurements(found.device, results)}  # read once
    monkeypatch.setattr(planning, "measurements", lambda device, folder: measured[device.name, folder])
    config = load_config(ONE_BILLION, SMALL)
    searched = search.search(config, found, results=results, progress=lambda *_: None)
    reached: dict[bool, set[Pace]] = {True: set(), False: set()}
    for one in searched.best:
        candidate = load_config(ONE_BILLION, [*SMALL, *settings(one, searched)])
        report = planning.fit(candidate, found, results=results)
        assert one.time == report.time, one.layout
        graphs = takes_graphs(candidate, data_size=report.data_size, device_type="cuda")
        reached[graphs].add(paces(candidate, found, measured[found.device.name, results]).slow)
    assert takes_graphs(config, data_size=2, device_type="cuda") and len(searched.best) > 50
    assert reached[True] and reached[False] and not reached[True] & reached[False], "their GPUs reach the same"


def test_a_search_for_an_offloading_run_says_that_its_layouts_do_not_offload() -> None:
    found, keys = h100(2), [*SMALL, "parallel.offload_optimizer=true"]
    report = search.search(load_config(ONE_BILLION, keys), found, results=NOWHERE, progress=lambda *_: None)
    best = report.best[0]
    chosen = load_config(ONE_BILLION, [*keys, *settings(best, report)])
    assert layout_plan.step_time(chosen, found, Measurements()) == best.time
    written = parse_config(chosen_tree(ONE_BILLION, keys, best.layout.overrides() | report.beside, "2 x h100-80gb"))
    assert written.parallel == chosen.parallel
    assert why_no_time(chosen, found) is None


def test_of_layouts_as_fast_the_one_with_more_headroom_comes_first() -> None:
    time = StepTime(Terms(compute=1.0), Terms(compute=2.0))
    slower = StepTime(Terms(compute=1.0), Terms(compute=2.1))
    layouts = [Layout(1, 1, 1, zero, False, "none", 1) for zero in range(4)]
    given = [(time, 5), (slower, 1), (time, 4), (time, 4)]
    found = [
        Found(layout=layout, time=seconds, needed=needed)
        for layout, (seconds, needed) in zip(layouts, given, strict=True)
    ]
    assert [one.layout.zero for one in sorted(found, key=lambda one: one.rank)] == [2, 3, 0, 1]


def test_a_search_for_what_is_too_large_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_plan, "stage_memories", by_stage(lambda *args, **kwargs: whole(1000)))
    report = search.search(load_config(ONE_BILLION, SMALL), h100(2), results=NOWHERE, progress=lambda *_: None)
    assert not report.best and sum(report.excluded.values()) == report.excluded[search.FULL] > 4 * report.traced
    monkeypatch.setattr(search, "MOST_REHEARSED", 3)
    report = search.search(load_config(ONE_BILLION, SMALL), h100(2), results=NOWHERE, progress=lambda *_: None)
    assert report.traced <= 4 and any(reason.startswith("not rehearsed") for reason in report.excluded)


@pytest.mark.parametrize("error", [StepStops, CannotRehearse])
def test_a_layout_whose_step_stops_is_none_to_choose(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on, as does the one of `fit` for a change that helps."""

    def stages(config: Config, found: Machine, stages: Any = None) -> list[Any]:
        if config.parallel.zero == 1:
            raise error("step: an operator is missing")
        return [estimate(config, found.num_gpus, "cuda")]

    monkeypatch.setattr(layout_plan, "stage_memories", stages)
    config = load_config(ONE_BILLION, SMALL)
    report = search.search(config, h100(2), results=NOWHERE, progress=lambda *said: None)
    assert report.best and all(one.layout.zero != 1 for one in report.best)
    assert report.excluded["step: an operator is missing"] > 0
    run = config.replaced("parallel", zero=0).replaced("train", precision="fp32")
    change, tried = planning.cheapest_change(run, h100(2), Measurements())
    assert tried > 0 and change is not None and "parallel.zero=1" not in change.overrides


def test_groups_of_their_own_leave_every_layout() -> None:
    """Stages may have groups of parameters that others lack, also where experts are divided."""
    config = load_config(ONE_BILLION, [*SMALL, "optimizer.groups.head.learning_rate_ratio=2"])
    legal, refused = search.legal_layouts(config, h100(4))
    others, _ = search.legal_layouts(load_config(ONE_BILLION, SMALL), h100(4))
    assert legal == others and "optimizer.groups" not in refused
    assert (2, 2) in {(layout.pipeline, layout.expert) for layout in legal}


def test_ranks_are_divided_in_every_way_that_can_be() -> None:
    """Tensor groups stay on a node, each stage has a block, and sequences are divided by tensor groups alone."""
    config, sixteen = load_config(ONE_BILLION, ["model.num_layers=3"]), h100(16)
    found = list(search._divisions(config, sixteen))
    assert len(set(found)) == len(found)
    assert {(tensor, pipeline) for tensor, pipeline, *_ in found} == {(t, s) for t in (1, 2, 4, 8) for s in (1, 2)}
    assert {expert for tensor, pipeline, expert, *_ in found if (tensor, pipeline) == (4, 2)} == {1, 2}
    assert {(tensor > 1, sequence) for tensor, *_, sequence in found} == {(False, False), (True, False), (True, True)}
    assert search._micro_batches(config.replaced("batch", global_sequences=24), sixteen, 4) == [1, 2, 3, 6]
    assert search._micro_batches(config.replaced("batch", global_sequences=24), sixteen, 1) == []  # 1.5 for each


def test_no_more_are_tried_than_are_shown_but_for_those_as_fast() -> None:
    trials = search.Trials(load_config(ONE_BILLION), h100(8), Measurements(), Counter())
    layouts = [search.Layout(1, 1, 1, 1, False, "none", size) for size in range(1, 16)]
    tried: Any = trials.fitting  # each fits
    trials._try = tried.append
    trials.run([(float(max(n, 9)), layout) for n, layout in enumerate(layouts, 1)], lambda *_: None)
    assert tried == layouts[:10]  # nine take equally long, then one by one
    assert trials._excluded == {search.SLOWER: 5}


def test_times_are_told_apart_by_three_digits() -> None:
    values = {123.456: 123.0, 1.23456: 1.23, 0.00123456: 0.00123, 9.999: 10.0, 0.0: 0.0}
    assert {seconds: layout_plan.rounded(seconds) for seconds in values} == pytest.approx(values)


def test_reasons() -> None:
    report = search.search(load_config(ONE_BILLION, SMALL), h100(4), results=NOWHERE, progress=lambda *_: None)
    assert {"parallel.zero", "parallel.expert", "train.recompute"} <= report.refused.keys()
    assert report.refused["train.recompute"][1].startswith("train.recompute: selective does not go with")
    assert any(reason.startswith("slower than") for reason in report.excluded)
    # On four cards, with 8 sequences a step: t x p of them hold a model, and 2 t p sequences are a rank's share.
    sizes = itertools.product((1, 2, 4), (1, 2), (1, 2, 4))
    shares = [(tensor, 2 * tensor * pipeline) for tensor, pipeline, expert in sizes if tensor * pipeline * expert <= 4]
    micro = [len([size for size in range(1, share + 1) if share % size == 0]) for _, share in shares]
    zero_and_sequence = [4 * (2 if tensor > 1 else 1) for tensor, _ in shares]
    assert report.layouts == sum(3 * a * b for a, b in zip(micro, zero_and_sequence, strict=True))


def test_nothing_fits_and_nothing_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(layout_plan, "stage_memories", by_stage(lambda *args, **kwargs: whole(1000)))
    line = ["search", str(ONE_BILLION), "--gpus", "2", "--gpu", "h100-80gb", "--results", str(ONE_BILLION.parent)]
    small = [argument for setting in SMALL for argument in ("--set", setting)]
    assert main([*line, *small]) == 2
    printed = capsys.readouterr()
    assert "no layout fits 2 x h100-80gb" in printed.err and "activations do not fit" in printed.out
    assert main([*line, *small, "--gpus", "7", "--gpus-per-node", "7"]) == 2
    assert "allow no layout on 7 x h100-80gb, e.g. " in capsys.readouterr().err
    with pytest.raises(UserError, match="layouts cannot be ranked"):
        search.search(
            load_config(ONE_BILLION),
            machine(MachineOptions(gpu="prototype", gpus=1, memory_gib=80)),
            results=NOWHERE,
            progress=lambda *_: None,
        )


def search_line(config: Path, *more: str) -> list[str]:
    """On two cards, without records of measurements."""
    return ["search", str(config), "--gpus", "2", "--gpu", "h100-80gb", "--results", str(ONE_BILLION.parent), *more]


def test_the_file_is_the_users_with_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "chosen.json"
    settings = [argument for setting in ("train.seed=3", *SMALL) for argument in ("--set", setting)]
    line = search_line(ONE_BILLION, *settings, "--write", str(target))
    assert main(line) == 0
    assert f"--config {target} --dry-run --ranks 2" in capsys.readouterr().out
    chosen, original = load_config(target), load_config(ONE_BILLION)
    check_ranks(chosen, 2)
    assert chosen.train.seed == 3 and chosen.optimizer == original.optimizer and chosen.data == original.data
    assert chosen.description.startswith("Layout by plan.py search for 2 x h100-80gb, of switchall_1b.json. SwitchAll")
    assert main(line) == 0  # its own file is replaced
    assert "Layout by" not in chosen.description[1:] and list(tmp_path.iterdir()) == [target]
    target.write_text('{"mine": 1}', encoding="utf-8")
    assert main(line) == 2 and target.read_text(encoding="utf-8") == '{"mine": 1}'
    assert "was not made by plan.py search" in capsys.readouterr().err
    assert main([*line, "--force"]) == 0 and json.loads(target.read_text(encoding="utf-8"))["batch"]
    assert main([*line[:-1], str(tmp_path)]) == 2 and main([*line[:-1], str(tmp_path / "absent" / "x.json")]) == 2


def test_table_options_file_and_json_are_of_the_same_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(layout: Layout, seconds: float) -> Found:
        return Found(layout=layout, time=StepTime(Terms(compute=seconds), Terms(compute=2 * seconds)), needed=10 * GIB)

    report = search.SearchReport(
        best=(found(Layout(2, 4, 1, 1, True, "selective", 2), 1.0), found(Layout(1, 2, 4, 1, False, "none", 5), 3.0)),
        beside={"parallel.offload_optimizer": False},
        refused={"a": (2, "a: few"), "b": (5, "b: more: of them")},
        excluded={"slower": 1, "too large": 7},
        layouts=1234,
        traced=4,
    )
    asked, target = list[Path](), tmp_path / "a file.json"

    def searched(*given: object, results: Path, **options: object) -> search.SearchReport:
        asked.append(results)
        return report

    monkeypatch.setattr("pretrain.cli.plan_search.search", searched)
    line = ["search", str(ONE_BILLION), "--gpus", "16", "--gpu", "h100-80gb", "--results", str(tmp_path)]
    assert main([*line, "--write", str(target)]) == 0 and asked == [tmp_path]
    out = capsys.readouterr().out
    usable = USABLE * (h100(16).capacity or 0)
    headroom = f"{usable / GIB - 10:.1f}"
    rows = [text.split() for text in out.splitlines() if headroom in text.split()]
    assert [(row[0], *row[-8:]) for row in rows] == [
        ("1", "2", "2", "4", "1", "1", "yes", "selective", "2"),
        ("2", "8", "1", "2", "4", "1", "no", "none", "5"),
    ]
    best = report.best[0].layout.overrides() | report.beside
    options = " ".join(
        f"--set {key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in best.items()
    )
    assert f"\nthe first as options: {options}\n" in out
    left = [text.strip() for text in out.partition("\nnot in the table\n")[2].splitlines()[:4]]
    rules = ["5  refused by a rule of b, e.g. more: of them", "2  refused by a rule of a, e.g. few"]
    assert left == ["7  too large", "1  slower", *rules]
    assert f"--config '{target}' --dry-run --ranks 16" in out
    tree = json.loads(target.read_text(encoding="utf-8"))
    assert (tree["parallel"]["pipeline"], tree["batch"]["micro_sequences"]) == (4, 2)
    assert main([*line, "--write", str(target), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert "wrote " in printed.err and (told["usable_bytes"], told["layouts"]) == (int(usable), 1234)
    assert told["best"][0]["set"] == best and told["best"][0]["total_seconds"] == {"fast": 1.0, "slow": 2.0}
    assert told["refused"]["b"] == {"count": 5, "example": "b: more: of them"} and told["excluded"] == report.excluded


def test_layouts_with_another_loss_are_named() -> None:
    """Of a regulariser over a micro-step on all data-parallel ranks: rows whose micro_sequences x data is another."""
    found = h100(2)
    for scope in ("micro_batch", "global_batch"):
        config = load_config(
            ONE_BILLION, [*SMALL, "batch.micro_sequences=2", f"model.feedforward.entropy_scope={scope}"]
        )
        report = search.search(config, found, results=NOWHERE, progress=lambda *_: None)
        text = "\n".join(lines_of(ONE_BILLION, config, report, found))
        named = re.findall(
            r"another loss than the run's: \d+ rows \((.*)\), where .* is not 4 \(model\.feedforward", text
        )
        data = (2 // (one.layout.tensor * one.layout.pipeline) for one in report.best)
        products = [one.layout.micro_sequences * size for one, size in zip(report.best, data, strict=True)]
        assert set(products) > {4}, "the search shows layouts of both kinds"
        others = ", ".join(str(row) for row, product in enumerate(products, 1) if product != 4)
        assert named == ([others] if scope == "micro_batch" else [])
        keys = ("model.feedforward.entropy_scope",)
        assert [one["another_loss"] for one in as_json(config, report, found)["best"]] == [
            {"keys": keys, "sequences": product, "run_sequences": 4} if product != 4 and named else None
            for product in products
        ]


def test_a_disk_that_refuses_the_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.json"))
    monkeypatch.setattr("pretrain.planning.layout_file.write_json", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"--write: .*x\.json cannot be written: No space left on device; make room"):
        write_config(tmp_path / "x.json", {}, force=False)


def test_a_file_of_a_file_of_the_search_says_once_what_it_is(tmp_path: Path) -> None:
    chosen = {"parallel.zero": 2}
    first = tmp_path / "first.json"
    first.write_text(json.dumps(chosen_tree(ONE_BILLION, (), chosen, "2 x a")), encoding="utf-8")
    again = chosen_tree(first, (), chosen, "4 x b")
    assert again["description"].startswith("Layout by plan.py search for 4 x b, of first.json. SwitchAll with")


def test_a_dry_run_takes_the_file(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user, chosen, run = tmp_path / "user.json", tmp_path / "chosen.json", ("--run-dir", str(tmp_path / "run"))
    user.write_text(json.dumps(to_json(small_config(prepared, "train.device=cpu"))), encoding="utf-8")
    assert main(search_line(user, "--write", str(chosen))) == 0
    assert train.main(["--config", str(chosen), "--dry-run", "--no-step", "--ranks", "2", *run]) == 0
    assert "Layout by plan.py search for 2 x h100-80gb" in capsys.readouterr().out
