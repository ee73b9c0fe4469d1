"""How evenly experts are used: by hand, on the terminal, and the watch for collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.report.monitor import Monitor, Origin
from pretrain.report.router_load import Collapsed, CollapseWatch, advice, choices, load_summary, load_text
from pretrain.report.run_folder import RunFolder
from tests.pretrain.runs import MOA, events, small_config

LOAD = {
    "blocks.0.feedforward.statistics": torch.tensor([6.0, 5.0, 1.0, 0.0, 0.0], dtype=torch.float64),
    "blocks.1.feedforward.statistics": torch.tensor([2.0, 3.0, 2.0, 3.0, 2.0], dtype=torch.float64),
    "blocks.0.attention.value_statistics": torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 2.0]], dtype=torch.float64),
    "blocks.0.attention.output_statistics": torch.tensor([[3.0, 3.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64),
}
"""12 choices of 2 in 5 and 6 of 2 in 3: six tokens, and three per head."""


def test_load_summary_by_hand(prepared: Path) -> None:
    model = small_config(prepared).model  # k = 2 of 3 in attention, 2 of 5 in the feed-forward
    assert load_summary(LOAD, model) == pytest.approx(
        {
            "attention_load_max": 3 / 2,
            "attention_busiest_share": 1.0,
            "attention_unused_experts": 1,
            "attention_unused_share": 1 / 12,
            "feedforward_load_max": 6 / (12 / 5),
            "feedforward_busiest_share": 11 / 12,
            "feedforward_unused_experts": 2,
            "feedforward_unused_share": 2 / 10,
        }
    )
    assert load_text(LOAD, model) == "attn 1.50/1.5, 1 unused  ffn 2.50/2.5, 2 unused"


def test_a_dense_layer_has_no_load_and_moa_chooses_its_heads(prepared: Path) -> None:
    dense = small_config(
        prepared,
        'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}',
        'model.feedforward={"type": "dense", "hidden_size": 22}',
    ).model
    assert choices(dense) == {} and load_summary({}, dense) == {} and load_text({}, dense) == ""
    moa = small_config(prepared, MOA).model
    load = {"blocks.0.attention.statistics": torch.tensor([4.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64)}
    assert load_text(load, moa) == "attn 2.50/2.5, 3 unused"  # 2 heads of 5 experts
    assert load_summary(load, moa)["attention_busiest_share"] == 1.0


def test_a_collapsed_router_is_named_after_a_while_and_then_seldom(prepared: Path) -> None:
    config = small_config(prepared, "monitor.collapse_after_steps=3", "monitor.collapse_share=0.91")
    watch = CollapseWatch(config.monitor, config.model)
    told = {step: watch.step(LOAD) for step in range(1, 14)}
    assert [step for step, due in told.items() if due] == [3, 6, 12]
    share: Any = pytest.approx(11 / 12)
    assert told[6] == [
        Collapsed("blocks.0.attention.output", 0, 1.0, 6),
        Collapsed("blocks.0.feedforward", None, share, 6),
    ]
    # One step in which it was even, and the count begins again.
    even = {name: torch.ones_like(counts) for name, counts in LOAD.items()}
    assert not watch.step(even)
    assert [bool(watch.step(LOAD)) for _ in range(3)] == [False, False, True]


def test_off_and_routers_that_choose_all_experts_are_silent(prepared: Path) -> None:
    off = small_config(prepared, "monitor.collapse_after_steps=0")
    watch = CollapseWatch(off.monitor, off.model)
    assert not any(watch.step(LOAD) for _ in range(600))
    keys = ("monitor.collapse_after_steps=1", "model.feedforward.active_experts=5", "model.attention.active_experts=3")
    config = small_config(prepared, *keys)
    assert not CollapseWatch(config.monitor, config.model).step(LOAD)


def test_a_share_that_an_even_router_reaches_watches_nothing(prepared: Path) -> None:
    even = {name: torch.ones_like(counts) for name, counts in LOAD.items()}
    config = small_config(prepared, "monitor.collapse_after_steps=1", "monitor.collapse_share=0.4")
    watch = CollapseWatch(config.monitor, config.model)  # 2 of 3 experts in attention, 2 of 5 in the feed-forward
    assert not watch.step(even) and not watch.step(LOAD)


def test_a_router_at_the_limit_itself_is_not_collapsed(prepared: Path) -> None:
    config = small_config(prepared, "monitor.collapse_after_steps=1", "monitor.collapse_share=0.75")
    watch = CollapseWatch(config.monitor, config.model)
    at, above = (
        torch.tensor([half, half, rest, 0.0, 0.0], dtype=torch.float64) for half, rest in ((3.0, 2.0), (4.0, 2.0))
    )
    even = {name: torch.ones_like(counts) for name, counts in LOAD.items()}
    assert not watch.step({**even, "blocks.0.feedforward.statistics": at})
    (due,) = watch.step({**even, "blocks.0.feedforward.statistics": above})
    assert due.share == 0.8


def test_a_router_without_a_choice_is_even_and_finite(prepared: Path) -> None:
    """As in a step whose every token was dropped."""
    nothing = {name: torch.zeros_like(counts) for name, counts in LOAD.items()}
    summary = load_summary(nothing, small_config(prepared).model)
    assert summary["feedforward_load_max"] == summary["attention_busiest_share"] == 0.0
    assert summary["feedforward_unused_share"] == 1.0


def test_what_may_help_depends_on_the_layer(prepared: Path) -> None:
    of_attention, of_experts = (Collapsed(f"blocks.0.{kind}", None, 1.0, 9) for kind in ("attention", "feedforward"))
    switchhead, moa = (small_config(prepared, *keys).model for keys in ((), (MOA,)))
    rate = "or lower optimizer.learning_rate"
    assert advice(switchhead, [of_attention]) == f"raise model.attention.entropy_weight, {rate}"
    assert advice(moa, [of_attention]) == f"raise model.attention.switch_loss_weight, {rate}"
    both = "model.feedforward.entropy_weight and model.attention.entropy_weight"
    assert advice(switchhead, [of_attention, of_experts]) == f"raise {both}, {rate}"


def values(step: int, loss: float | None, norm: float | None, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl, of a step of 128 tokens."""
    return {
        "step": step,
        "loss": loss,
        "grad_norm": norm,
        "lr": 0.001 * step,
        "tokens_per_second": 128 / seconds,
        "step_seconds": seconds,
        "memory_bytes": 3 << 29,
        "memory_peak_bytes": 2 << 30,
    }


def test_a_line_has_the_means_of_its_interval(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, "monitor.print_every_steps=4", "monitor.collapse_after_steps=2")
    folder = RunFolder(tmp_path, writes=True)
    monitor = Monitor(config, folder, Origin(0, 0, 9, torch.device("cpu"), 1))
    even = {name: torch.ones_like(counts) for name, counts in LOAD.items()}
    for step, loss, norm, seconds, load in (
        (1, 6.0, 1.0, 1.0, even),
        (2, 5.0, 2.0, 1.0, LOAD),
        (3, None, None, 1.0, LOAD),
        (4, 4.0, 4.0, 2.0, even),
        (5, 3.0, 3.0, 1.0, even),
    ):
        monitor.step(values(step, loss, norm, seconds), load)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/9", "step 3/9", "step 4/9"]
    assert lines[0].startswith("step 1/9  loss 6.0000  ppl 403.4  grad 1.000  lr 1.00e-03  128 tok/s")
    assert lines[1] == "step 3/9  loss not finite, update skipped"
    assert lines[2].startswith("warning: step 3: collapsed routers (share of the choices that")
    assert "blocks.0.attention.output head 0 (100.0% for 2 steps)" in lines[2]
    assert "raise model.attention.entropy_weight, or lower optimizer.learning_rate" in lines[2]
    # Steps 2 to 4: losses 5 and 4, norms 2 and 4, 384 tokens in 4 s, the last step's rate, counts summed.
    assert lines[3].startswith(
        "step 4/9  loss 4.5000  ppl 90.02  grad 3.000  lr 4.00e-03  96 tok/s  "
        "attn 1.40/1.5  ffn 2.24/2.5  mem 1.5/2.0 GiB  elapsed 0:00  ETA "
    )
    (event,) = events(tmp_path, "router_collapsed")
    collapsed = {"router": "blocks.0.attention.output", "head": 0, "busiest_share": 1.0, "steps": 2}
    assert event["step"] == 3 and event["routers"][0] == collapsed
