"""benchmarks/gpu/micro_step.py and block.py: what is built, what lies between two looks at the clock, and MFU."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import block, ceilings, micro_step, models
from benchmarks.gpu.command import Context, Failed
from benchmarks.gpu.micro_step import Step
from benchmarks.gpu.timing import HostClock
from model.config import DenseAttentionConfig, SwitchHeadConfig
from tests.benchmarks.gpu import cases
from tests.benchmarks.gpu.cases import CPU, MEASURED

SMALL = models.load("tiny", num_layers=1, sequence_length=16)


def context(folder: Path, **more: Any) -> Context:
    return cases.context(folder, **(MEASURED | more))


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in (*micro_step.ALL, *micro_step.TINY)}))
def test_what_a_kind_of_micro_step_is(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict[str, Any] = {"record": 0, "compile": 0}

    class Fake:
        def __init__(
            self, config: Any, device: Any, sequences: int, backend: str = "auto", *, has_documents: bool = False
        ) -> None:
            made.update(config=config, sequences=sequences, backend=backend, has_documents=has_documents)

        def record(self) -> None:
            made["record"] += 1

        def compile(self) -> None:
            made["compile"] += 1

        def __call__(self) -> None:
            raise Stop

    monkeypatch.setattr(micro_step, "Step", Fake)
    with pytest.raises(Stop):
        micro_step.compute(context(tmp_path), name="tiny", sequences=3, kind=kind)
    words = kind.split()
    assert isinstance(made["config"].attention, DenseAttentionConfig if "dense" in words else SwitchHeadConfig)
    assert made["record"] == ("graphs" in words or kind == "sets") and made["compile"] == (kind == "compiled")
    assert (made["backend"], made["sequences"]) == ("sets" if kind == "sets" else "auto", 3)
    assert made["has_documents"] is ("documents" in words)


def test_the_clock_stands_around_a_step_and_the_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And begins after what was launched before has ended."""
    now, log = [0.0], list[str]()

    class Fake:
        def __call__(self) -> None:
            log.append("step")
            now[0] += 1.0

        def _wait(self) -> None:
            log.append("wait")
            now[0] += 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert Step.timed(Fake()) == (101.0, 1.0)  # type: ignore[arg-type]
    assert log == ["wait", "step", "wait"]


def test_three_steps_come_before_those_that_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With graphs the first is launched and the second recorded. A loss that is not finite fails the part, timed."""
    log: list[str] = []

    class Seen(Step):
        def __call__(self) -> None:
            log.append("step")
            super().__call__()
            self.loss = self.loss * torch.nan

        def timed(self) -> tuple[float, float]:
            log.append("timed")
            return super().timed()

    monkeypatch.setattr(models, "load", lambda name: SMALL)
    monkeypatch.setattr(micro_step, "Step", Seen)
    with pytest.raises(Failed, match="the loss is not finite") as failure:
        micro_step.compute(context(tmp_path), name="tiny", sequences=1)
    assert failure.value.result["tokens"] == 16 and log == ["step"] * 3 + ["timed", "step"] * 3  # the last: profiled


def test_graphs_of_parts_before_leave_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the cache is emptied: what a cycle of objects holds is not in the cache."""
    log = list[str]()

    class Graphs:
        def __del__(self) -> None:
            log.append("freed")

    held: Any = Graphs()
    held.itself = held
    gc.disable()
    try:
        del held
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("emptied"))
        micro_step.free_memory()
    finally:
        gc.enable()
    assert log == ["freed", "emptied"]


def test_gradients_are_those_of_one_step() -> None:
    step = Step(SMALL, CPU, 1)
    found = []
    for _ in range(2):
        step()
        found.append({name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 5 and all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


def test_documents_reach_the_model() -> None:
    """Others than without them is what it computes."""
    losses = []
    for has_documents in (False, True):
        torch.manual_seed(1)
        step = Step(SMALL, CPU, 2, has_documents=has_documents)
        step()
        losses.append(float(step.loss))
    assert losses[0] != losses[1]


def test_utilisation_is_that_of_the_forward_and_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """switchall_1b, 131,492 tokens a second on an H200, by hand. A token's products, forward: in each of 18 blocks
    queries and keys 2 x 2048 x 1024, 2 of 4 experts of value and output 2 x 8 x 2 x 2048 x 128, σ-MoE 8 x 2 x 2048 x
    128, routers 2048 x (16 x 4 + 64), attention to 2048 keys, causal masking not deducted, 2 x 8 x 128; and the output
    layer 2048 x 32000."""
    config = models.load("1b")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    given = context(
        tmp_path, **{ceilings.PRODUCT: {"flops_per_second": 8e14}, ceilings.COPY: {"bytes_per_second": 1.0}}
    )
    on_card = dataclasses.replace(given, device=torch.device("cuda", 0))
    found = micro_step.utilisation(config, 131_492.0, on_card)
    in_block = 2 * 2048 * 1024 + 2 * 8 * 2 * 2048 * 128 + 8 * 2 * 2048 * 128 + 2048 * (16 * 4 + 64)
    macs = config.num_layers * (in_block + 2048 * 2 * 8 * 128) + 2048 * 32000
    assert found["mfu"] == pytest.approx(3 * 2 * macs * 131_492 / 989.4e12, rel=0.02)
    assert found["flops_of_ceiling"] == pytest.approx(found["mfu"] * 989.4e12 / 8e14, rel=1e-2)
    assert micro_step.utilisation(config, 131_492.0, given) == {"flops_of_ceiling": found["flops_of_ceiling"]}


class Both(nn.Module):
    """Its result and its auxiliary loss have a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.balance = (nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, (x * self.balance).sum()


def test_a_block_is_timed_with_the_gradients_of_all_it_has() -> None:
    layer, seen = Both(), list[str]()
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.append(name))
    block.timed(HostClock(), layer, layer, torch.randn(2, 3), 1)
    assert set(seen) == {"weight", "balance"}


def test_the_ratio_of_times_is_over_that_of_multiply_accumulates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """3 times the dense layer's time with a quarter of its MACs: 12."""
    ours = {"attention": {"ms": 3.0}, "block": {"ms": 5.0}, "attention_macs": 100}
    dense = {"attention": {"ms": 1.0}, "block": {"ms": 4.0}, "attention_macs": 400}
    monkeypatch.setattr(models, "load", lambda name, **_: SMALL)
    is_dense = lambda config: isinstance(config.attention, DenseAttentionConfig)  # noqa: E731
    monkeypatch.setattr(block, "_layers", lambda context, config, *_: dense if is_dense(config) else ours)
    found = block.compute(context(tmp_path), name="tiny")
    assert (found["time_ratio"], found["mac_ratio"], found["time_over_macs"]) == (3.0, 0.25, 12.0)
    assert found["model"] is ours and found["dense"] is dense
