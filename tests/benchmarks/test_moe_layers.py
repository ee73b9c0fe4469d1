"""The layers that benchmarks/moe_layers.py and benchmarks/kernels_switchhead.py compare do the same work. No timing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import kernels, kernels_switchhead, moe_layers, page, peers, records, timed_cases
from benchmarks.moe_layers import OURS, PLAIN, Shape, Work, checked_work, difference, suite_of
from benchmarks.timed_cases import Case, Suite, Timed, measure, time_case
from model.attention.switchhead import SwitchHeadAttention
from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from pretrain.config.loading import load_config
from tests.harness import run_ranks

SMALL = Shape(tokens=40, d_model=16, num_experts=4, active_experts=2, expert_size=8)


def without_peers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Suite:
    """Ours and F.grouped_mm alone: the others need a process group."""
    with monkeypatch.context() as patch:
        for name in ("deepspeed_moe", "megatron_sequential_mlp"):
            patch.setattr(peers, name, lambda *args: (lambda x: x, []))
        suite = suite_of("small", SMALL, dtype)
    return suite._replace(cases=suite.cases[:-2])


def names_after_a_forward_pass(rank: int) -> list[object]:
    """The work of all layers, and after megatron-core's layer ran: whether torch has its own names, and how many graphs
    it makes of a function that it compiles."""
    before = torch.cuda.current_device
    torch.manual_seed(0)
    suite = suite_of("small", SMALL, torch.float32)
    measure(suite, torch.float32, 1)
    work, graphs = checked_work(suite, torch.float32), []

    def noted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=noted)(torch.ones(2))
    return [work, torch.cuda.current_device is before, len(graphs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_and_grouped_mm_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    suite = without_peers(monkeypatch, dtype)
    cases = {case.name: case for case in suite.cases}
    assert set(cases) == {OURS, "ours, grouped_mm", "ours, reference", PLAIN}
    for name in cases:
        assert difference(cases[name], cases[PLAIN]) <= moe_layers.TOLERANCE[dtype], name


def test_a_layer_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = without_peers(monkeypatch, torch.float32)
    own, plain = suite.cases[0], suite.cases[-1]
    assert checked_work(suite, torch.float32).macs[OURS] == SMALL.macs + 40 * 16 * 4  # and the router's
    other = Case(PLAIN, lambda: 2.0 * plain.forward(), plain.inputs)
    with pytest.raises(ValueError, match="differ by"):
        checked_work(suite._replace(cases=[own, other]), torch.float32)
    with pytest.raises(ValueError, match="numbers of parameters"):
        checked_work(suite._replace(cases=[own, Case(PLAIN, plain.forward, plain.inputs[:-1])]), torch.float32)
    idle = Case("idle", lambda: own.inputs[0] * 1.0, own.inputs)
    with pytest.raises(ValueError, match="computes less"):
        checked_work(suite._replace(cases=[own, plain, idle]), torch.float32)


def test_every_round_has_other_tokens_and_all_layers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = without_peers(monkeypatch, torch.float32)
    seen: list[torch.Tensor] = []

    def noted(case: Case) -> Case:
        def forward() -> torch.Tensor:
            seen.append(case.inputs[0].detach().clone())
            return case.forward()

        return case._replace(forward=forward)

    measure(suite._replace(cases=[noted(case) for case in suite.cases[::3]]), torch.float32, 2)
    assert len(seen) == 6  # two layers, a round that warms up and two more
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[4])


def test_the_two_passes_alone_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each look at the clock; what the gradient from above takes is in neither pass."""
    seen: list[str] = []

    def noted(what: str) -> float:
        seen.append(what)
        return float(seen.count("clock"))

    x, ones = torch.ones(3, requires_grad=True), torch.ones_like
    monkeypatch.setattr(torch, "ones_like", lambda y: noted("gradient") and ones(y))
    monkeypatch.setattr(timed_cases, "seconds", lambda: noted("clock"))
    assert time_case(Case("x", lambda: noted("forward") * x, [x])) == (1.0, 2.0)
    assert seen == ["clock", "forward", "clock", "gradient", "clock", "clock"]


def test_the_peers_do_as_much_and_leave_torch_as_it_was() -> None:
    work, keeps_cuda, graphs = run_ranks(names_after_a_forward_pass, 1)[0]
    assert keeps_cuda and graphs == 1
    assert isinstance(work, Work)
    useful, router = SMALL.macs, 40 * 16 * 4
    assert set(work.parameters.values()) == {16 * 4 + 2 * 4 * 16 * 8}
    for name in (OURS, PLAIN, "megatron-core SequentialMLP"):
        assert work.macs[name] == useful + router, name
    assert work.macs["DeepSpeed MoE"] > useful + router  # every expert is filled up to the most loaded one


@pytest.mark.parametrize(("name", "config"), [("47M", "c4_switchall_47m"), ("259M", "c4_switchall_259m")])
def test_the_shapes_are_the_papers(name: str, config: str) -> None:
    """But for the width of the small one, which grouped_mm cannot have in bf16."""
    model = model_of(config)
    feedforward, shape = model.feedforward, moe_layers.SHAPES[name]
    assert isinstance(feedforward, SigmaMoEConfig)
    assert shape[2:] == (feedforward.num_experts, feedforward.active_experts, feedforward.expert_size)
    assert shape.d_model == -(-model.d_model // 8) * 8


def test_the_switchhead_layer_is_the_papers() -> None:
    model = model_of("c4_switchhead_262m")
    attention = model.attention
    assert isinstance(attention, SwitchHeadConfig)
    layer = kernels_switchhead.layers(torch.float32)["switchhead"]
    assert isinstance(layer, SwitchHeadAttention)
    assert layer.config.model_dump() == attention.model_dump() | {"expert_dropout": 0.0}


def model_of(config: str) -> ModelConfig:
    return load_config(Path(f"configs/paper/{config}.json"), []).model


def test_kept_layers_become_tables_and_pictures(tmp_path: Path) -> None:
    """A ratio is the median of ratios within a round; torch.mm's share is of the useful work."""
    suite = Suite("47M: T=1", 200, [])
    timed = Timed([1.0, 2.0], {OURS: [1.0, 1.0], PLAIN: [1.0, 1.0]}, {OURS: [2.0, 4.0], PLAIN: [3.0, 8.0]})
    kept = moe_layers.to_json(suite, "fp32", Work({OURS: 5, PLAIN: 5}, {OURS: 110, PLAIN: 100}, 1e-7), timed)
    kept["mm_flops"] = 300
    records.keep(tmp_path, "moe-layers", records.machine(), {"suites": [kept], "threads": 1, "rounds": 2})
    seconds = {f"{name} {phase}": [2.0, 4.0] for name in ("dense", "switchhead") for phase in ("fwd", "fwd+bwd")}
    seconds["switchhead fwd+bwd"] = [1.0, 3.0]
    layers = {"layers": {"fp32": seconds}, "threads": 1, "rounds": 2, "macs": {"dense": 4.0, "switchhead": 2.0}}
    records.keep(tmp_path, "switchhead-layers", records.machine(), layers)
    text = page.updated(page.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    assert f"| 47M: T=1 | fp32 | {OURS} | 1000.0 | 3000.0 | 1.00 | 100% | 1.10 |" in text
    assert f"| 47M: T=1 | fp32 | {PLAIN} | 1000.0 | 5500.0 | 1.75 | 58% | 1.00 |" in text
    assert "| fp32 | switchhead | 3000.0 | 1.00 | 2000.0 | 0.62 | 0.50 |" in text
    names = ["benchmark-moe-layers.png", "benchmark-switchhead-layers.png"]
    assert sorted(path.name for path in page.draw(tmp_path, tmp_path)) == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_useful_work_of_a_layer_is_that_of_the_models_formulas() -> None:
    """4 projections of 1024 x 1024 and two products of [T, T] with 1024 columns; 6 of 1024 x 448, gates, selectors."""
    T, macs = 1024, kernels_switchhead.useful_macs()
    assert macs["dense"] == T * (4 * 1024 * 1024 + 2 * 1024 * T)
    ours = T * (6 * 1024 * 448 + 2 * 448 * T) + 2 * 4 * 2 * T * 112 + 2 * 4 * 1024 * T
    assert macs["switchhead"] == macs[kernels_switchhead.MASKED] == ours


def test_only_the_layers_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse_options(["--keep"])
    assert "add --op sigma_moe" in capsys.readouterr().err
    assert kernels.parse_options(["--op", "sigma_moe", "--keep"]).threads == 1


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_no_round_and_no_thread_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse_options([option, "0"])
    assert f"argument {option}: expected a whole number of at least 1" in capsys.readouterr().err
