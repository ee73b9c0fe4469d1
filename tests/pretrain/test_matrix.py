"""Every legal pair of ways to divide a model, and all of them together, on up to 8 ranks: losses, gradient norms with
clipping active, and the gradient of every parameter are those of plain PyTorch in one process, without and with every
dropout. The fast tier runs a subset in which every way of dividing occurs; the slow tier runs all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.model.options import check_kinds, kinds
from tests.pretrain import family
from tests.pretrain.matrix import GRADIENT_STEPS, MODELS, STEPS, Layout, config_of
from tests.pretrain.runs import Trace, assert_same, engine_trace, plain_trace

LAYOUTS = [
    # 1 rank
    Layout(zero=1, recompute="full", tied=True),
    Layout(zero=0, recompute="selective", micro=8),
    Layout(zero=2, tied=True),
    Layout(zero=3, recompute="full"),
    Layout(zero=3, tied=True),
    # 2 ranks
    Layout(tensor=2, zero=1, micro=8),
    Layout(tensor=2, zero=0, tied=True, recompute="selective"),
    Layout(tensor=2, zero=2, recompute="full"),
    Layout(tensor=2, zero=3),
    Layout(tensor=2, sequence=True, zero=0, micro=4),
    Layout(tensor=2, sequence=True, zero=1, recompute="full", tied=True),
    Layout(tensor=2, sequence=True, zero=2, recompute="selective"),
    Layout(tensor=2, sequence=True, zero=3),
    Layout(pipeline=2, micro=4, recompute="full"),
    Layout(pipeline=2, tied=True, recompute="selective", micro=1),
    Layout(data=2, zero=0, tied=True, micro=4),
    Layout(data=2, zero=1, recompute="selective"),
    Layout(data=2, zero=2, recompute="full", micro=1),
    Layout(data=2, zero=3, tied=True),
    Layout(data=2, expert=2, zero=1, tied=True, micro=4),
    Layout(data=2, expert=2, zero=2, recompute="full"),
    # 4 ranks
    Layout(pipeline=4, recompute="full", tied=True),
    Layout(pipeline=4, micro=1),
    Layout(tensor=2, data=2, zero=0, micro=1, recompute="full"),
    Layout(tensor=2, data=2, zero=2, tied=True),
    Layout(tensor=2, data=2, zero=3, recompute="full"),
    Layout(tensor=2, sequence=True, data=2, zero=3, tied=True),
    Layout(tensor=2, sequence=True, data=2, expert=2, zero=1),
    Layout(tensor=2, sequence=True, data=2, expert=2, zero=2, recompute="selective", tied=True, micro=4),
    Layout(tensor=2, pipeline=2, micro=2),
    Layout(tensor=2, sequence=True, pipeline=2, recompute="selective", micro=1),
    Layout(pipeline=2, data=2, micro=4, tied=True),
    Layout(pipeline=2, data=2, expert=2, micro=1, recompute="full"),
    # 8 ranks
    Layout(tensor=2, pipeline=2, data=2, recompute="selective"),
    Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2, zero=1),
    Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2, zero=1, micro=1, recompute="full", tied=True),
    Layout(tensor=2, sequence=True, pipeline=4, micro=2, recompute="selective"),
    Layout(tensor=2, pipeline=4, recompute="full", micro=4),
    Layout(pipeline=4, data=2, expert=2, tied=True, micro=2),
    Layout(tensor=2, sequence=True, data=4, expert=4, zero=2, micro=1),
    Layout(data=8, expert=2, zero=1, micro=1),
]
FAST = [
    ("switchall", True, [Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2, zero=1)]),
    ("switchall xl", False, [Layout(tensor=2, sequence=True, pipeline=2, recompute="selective", micro=4)]),
    ("switchall rope with memory", False, [Layout(tensor=2, sequence=True, pipeline=2, recompute="full", micro=4)]),
    ("moa", False, [Layout(pipeline=4, micro=2), Layout(pipeline=2, data=2, expert=2, micro=2, recompute="full")]),
    ("dense, grouped queries", False, [Layout(tensor=2, sequence=True, pipeline=2, recompute="selective", micro=4)]),
    (
        "dense",
        True,
        [
            Layout(tensor=2, data=2, zero=0, micro=2),
            Layout(tensor=2, data=2, zero=2, tied=True),
            Layout(tensor=2, data=2, zero=3, recompute="full"),
        ],
    ),
]
"""What every commit runs: model, every dropout on, layouts of one fork. Each way of dividing occurs."""
FEW_STEPS, FEW_GRADIENT_STEPS = 3, (0, 2)
"""Of test_some: the last has weights, moments and memory of two steps."""


def ways(layout: Layout) -> set[str]:
    """The ways of dividing and of computing that a layout combines."""
    found = {f"ZeRO {layout.zero}"}
    found |= {name for name, used in {
        "TP 2": layout.tensor == 2,
        "SP": layout.sequence,
        "PP 2": layout.pipeline == 2,
        "PP 4": layout.pipeline == 4,
        "DP 2": layout.data == 2,
        "EP 2": layout.expert == 2,
        "selective": layout.recompute == "selective",
        "full": layout.recompute == "full",
        "accumulation": layout.micro * layout.data < 8,
        "tied": layout.tied,
    }.items() if used}  # fmt: skip
    return found


ILLEGAL = {
    frozenset(pair)
    for pair in [
        *(("PP 2", f"ZeRO {zero}") for zero in (0, 2, 3)),
        *(("PP 4", f"ZeRO {zero}") for zero in (0, 2, 3)),
        ("PP 2", "PP 4"),
        ("selective", "full"),
        ("selective", "ZeRO 3"),
        *(("EP 2", f"ZeRO {zero}") for zero in (0, 3)),
        *((f"ZeRO {a}", f"ZeRO {b}") for a, b in itertools.combinations(range(4), 2)),
    ]
}


def test_every_legal_pair_occurs() -> None:
    assert len(LAYOUTS) >= 24 and len(set(LAYOUTS)) == len(LAYOUTS) and max(x.ranks for x in LAYOUTS) == 8
    names = sorted(set().union(*(ways(layout) for layout in LAYOUTS)))
    assert len(names) == 14
    assert set(names) == set().union(*(ways(layout) for _, _, layouts in FAST for layout in layouts))
    covered = {frozenset(pair) for layout in LAYOUTS for pair in itertools.combinations(sorted(ways(layout)), 2)}
    wanted = {frozenset(pair) for pair in itertools.combinations(names, 2)} - ILLEGAL
    assert wanted <= covered, sorted(map(sorted, wanted - covered))
    assert not covered & ILLEGAL


def test_every_layer_that_ranks_divide_is_in_a_model(prepared: Path) -> None:
    """Here, or in test_tensor_parallel.py."""
    configs = [config_of(prepared, model, Layout()).model for model in MODELS]
    configs += [family.config_of(prepared, model).model for model in family.MODELS]
    types = {layer.type for model in configs for layer in (model.attention, model.feedforward)}
    check_kinds(types, "MODELS of tests/pretrain/matrix.py or family.py", kinds("tensor"))


GROUPS = (
    "optimizer.weight_decay=0.3",
    "optimizer.groups.routers.weight_decay=6",
    "optimizer.groups.experts.learning_rate_ratio=0.5",
    "optimizer.groups.embedding.weight_decay=0",
)


@pytest.mark.slow  # the fast one: test_adamw_has_its_keys_in_every_layout in test_layouts.py
def test_groups_of_the_optimizer_hold_however_the_model_is_divided(prepared: Path) -> None:
    """The other ZeRO stages are in test_layouts.py."""
    layouts = [
        Layout(tensor=2, sequence=True, tied=True),
        Layout(pipeline=2, tied=True),
        Layout(pipeline=2, micro=4),
        Layout(data=2, expert=2),
        Layout(data=2, expert=2, zero=2),
    ]
    reference = {}
    for tied in (True, False):
        config = config_of(prepared, "switchall", Layout(micro=8, tied=tied), *GROUPS)
        reference[tied] = plain_trace(config, FEW_STEPS, FEW_GRADIENT_STEPS)
    configs = [config_of(prepared, "switchall", layout, *GROUPS) for layout in layouts]
    traces = run_ranks(engine_trace, 2, configs, FEW_STEPS, FEW_GRADIENT_STEPS, timeout_seconds=900)[0]
    for layout, trace in zip(layouts, traces, strict=True):
        assert_same(trace, reference[layout.tied], f"groups, {layout}")
    plain = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), FEW_STEPS, ())
    assert plain.losses[-1] != pytest.approx(reference[False].losses[-1], rel=1e-3), "groups have no effect"


References = dict[tuple[str, bool, bool, int], Trace]


@pytest.fixture(scope="module")
def references(prepared: Path) -> References:
    """Filled as needed: (model, tied, dropouts on, steps) -> trace of one process without DeepSpeed."""
    return {}


def reference_of(
    references: References,
    prepared: Path,
    model: str,
    steps: int,
    gradient_steps: tuple[int, ...],
    *,
    tied: bool,
    with_dropouts: bool,
) -> Trace:
    key = (model, tied, with_dropouts, steps)
    if key not in references:
        config = config_of(prepared, model, Layout(micro=8, tied=tied), with_dropouts=with_dropouts)
        references[key] = plain_trace(config, steps, gradient_steps)
        assert max(references[key].grad_norms) > 0.5, "clipping was never active"
    return references[key]


def legal(model: str, layout: Layout) -> bool:
    return not model.startswith("dense") or layout.expert == 1


@pytest.mark.slow
@pytest.mark.parametrize("with_dropouts", [False, True], ids=["without dropout", "with every dropout"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_all(prepared: Path, references: References, model: str, ranks: int, with_dropouts: bool) -> None:
    layouts = [x for x in LAYOUTS if x.ranks == ranks and legal(model, x)]
    check(prepared, references, model, layouts, with_dropouts, STEPS, GRADIENT_STEPS)


@pytest.mark.parametrize("model, with_dropouts, layouts", FAST)
def test_some(prepared: Path, references: References, model: str, with_dropouts: bool, layouts: list[Layout]) -> None:
    check(prepared, references, model, layouts, with_dropouts, FEW_STEPS, FEW_GRADIENT_STEPS)


def check(
    prepared: Path,
    references: References,
    model: str,
    layouts: list[Layout],
    with_dropouts: bool,
    steps: int,
    gradient_steps: tuple[int, ...],
) -> None:
    """One fork for all `layouts`, which have the same number of ranks."""
    configs = [config_of(prepared, model, layout, with_dropouts=with_dropouts) for layout in layouts]
    traces = run_ranks(engine_trace, layouts[0].ranks, configs, steps, gradient_steps, timeout_seconds=900)[0]
    failures = []
    for layout, trace in zip(layouts, traces, strict=True):
        reference = reference_of(
            references, prepared, model, steps, gradient_steps, tied=layout.tied, with_dropouts=with_dropouts
        )
        try:
            assert_same(trace, reference, f"{model} {layout}")
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)
