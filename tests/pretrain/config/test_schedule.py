"""Learning rates against torch's schedulers, the published numbers and formulas, and which runs can be extended."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.optim import lr_scheduler

from common.errors import ConfigError
from pretrain.config.loading import load_config, parse_config
from pretrain.config.schedule import keeps_the_past, learning_rate
from pretrain.config.schema import Config, ScheduleConfig

ROOT = Path(__file__).resolve().parents[3]
MODEL = {"d_model": 8, "num_layers": 1, "vocab_size": 16, "sequence_length": 4}
PEAK = 2.5e-4


def config(steps: int, **schedule: Any) -> Config:
    return parse_config(
        {"model": MODEL, "schedule": schedule, "train": {"steps": steps}, "optimizer": {"learning_rate": PEAK}}
    )


def rates(steps: int, **schedule: Any) -> list[float]:
    made = config(steps, **schedule)
    return [learning_rate(made, step) for step in range(steps)]


def torch_rates(steps: int, make: Any, peak: float = PEAK) -> list[float]:
    """What one of torch's schedulers sets, step by step."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def after_warmup(optimizer: Any, warmup: int, following: Any) -> Any:
    """torch's linear warm-up from 1 / (W + 1), then another scheduler."""
    rising = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising, following], milestones=[warmup])


def test_the_published_schedule_of_a_262m_config() -> None:
    """What the authors' code sets: warm-up to W = 4000, then the first 96,000 steps of a cosine of 100,000."""
    made = load_config(ROOT / "configs" / "paper" / "c4_switchhead_262m.json")
    published = {
        0: 6.25e-8,
        2000: 1.250625e-4,
        3999: 2.5e-4,
        4000: 2.5e-4,
        52000: 1.328488149411642e-4,
        99999: 9.86154579346e-7,
    }
    for step, value in published.items():
        assert learning_rate(made, step) == pytest.approx(value, rel=1e-12), step


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_published_is_torchs_cosine_of_the_whole_run_shifted_by_the_warmup() -> None:
    """As the authors' code drives it: CosineAnnealingLR of stop_after steps, set to step - warm-up, and the warm-up
    rate put over it."""
    steps, warmup = 60, 7
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, expected = lr_scheduler.CosineAnnealingLR(optimizer, steps), []
    optimizer.step()  # torch warns where a scheduler goes first
    for step in range(steps):
        scheduler.step(max(0, step - warmup))
        rate = optimizer.param_groups[0]["lr"]
        expected.append(rate / warmup * (step + 1) if step < warmup else rate)
    assert rates(steps, shape="published", warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)
    without = rates(steps, shape="published")
    assert without == rates(steps), "without a warm-up both cosines are the same"


def test_cosine_and_linear_are_torchs() -> None:
    steps, warmup = 50, 6
    cosine = torch_rates(
        steps, lambda o: after_warmup(o, warmup, lr_scheduler.CosineAnnealingLR(o, steps - warmup, eta_min=0.1 * PEAK))
    )
    assert rates(steps, warmup_steps=warmup, final_ratio=0.1) == pytest.approx(cosine, rel=1e-9)
    linear = torch_rates(
        steps,
        lambda o: after_warmup(
            o, warmup, lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=steps - warmup)
        ),
    )
    assert rates(steps, shape="linear", warmup_steps=warmup, final_ratio=0.1) == pytest.approx(linear, rel=1e-9)


def test_constant_is_torchs() -> None:
    expected = torch_rates(30, lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 6, total_iters=5))
    assert rates(30, shape="constant", warmup_steps=5) == pytest.approx(expected, rel=1e-12)
    assert rates(3, shape="constant") == [PEAK] * 3


@pytest.mark.parametrize("decay", ["linear", "sqrt"])
def test_wsd_by_its_formula(decay: str) -> None:
    """Warm-up, plateau, and down in the last D steps (arXiv 2405.18392, section 3)."""
    steps, warmup, D = 40, 4, 10
    expected = []
    for step in range(steps):
        share = (step - (steps - D)) / D
        falling = 1 - share if decay == "linear" else 1 - math.sqrt(max(share, 0))
        factor = (step + 1) / (warmup + 1) if step < warmup else 1.0 if share < 0 else 0.2 + 0.8 * falling
        expected.append(PEAK * factor)
    made = rates(steps, shape="wsd", warmup_steps=warmup, decay_steps=D, decay=decay, final_ratio=0.2)
    assert made == pytest.approx(expected, rel=1e-12)
    assert made[warmup : steps - D + 1] == [PEAK] * (steps - D + 1 - warmup)
    assert rates(steps, shape="wsd", decay_steps=D, decay=decay)[-1] > 0, "the last step still learns"


def test_wsd_linear_decay_is_torchs() -> None:
    def make(optimizer: Any) -> Any:
        falling = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=10)
        steady = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
        return lr_scheduler.SequentialLR(optimizer, [steady, falling], milestones=[20])

    assert rates(30, shape="wsd", decay_steps=10) == pytest.approx(torch_rates(30, make), rel=1e-9, abs=1e-18)


def test_wsd_shorter_than_its_parts_meets_in_the_middle() -> None:
    made = rates(8, shape="wsd", warmup_steps=6, decay_steps=8)
    rising, falling = [PEAK * (i + 1) / 7 for i in range(8)], [PEAK * (8 - i) / 8 for i in range(8)]
    assert made == pytest.approx([min(pair) for pair in zip(rising, falling, strict=True)], rel=1e-12)


def test_inverse_sqrt_is_the_transformers() -> None:
    """min(s / W', sqrt(W' / s)) of "Attention Is All You Need", section 5.3, s counted from 1, W' = W + 1."""
    expected = torch_rates(60, lambda o: lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 9, math.sqrt(9 / (i + 1)))))
    assert rates(60, shape="inverse_sqrt", warmup_steps=8) == pytest.approx(expected, rel=1e-12)
    assert rates(4, shape="inverse_sqrt") == pytest.approx([PEAK / math.sqrt(i) for i in (1, 2, 3, 4)], rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "published", "linear"])
def test_a_run_shorter_than_its_warmup_still_reaches_the_peak(shape: str) -> None:
    assert rates(1, shape=shape, warmup_steps=100) == [PEAK]
    assert rates(3, shape=shape, warmup_steps=100)[-1] == PEAK


@pytest.mark.parametrize("shape", ["constant", "inverse_sqrt"])
def test_what_can_be_extended_does_not_clip_its_warmup(shape: str) -> None:
    long, short = rates(30, shape=shape, warmup_steps=20), rates(10, shape=shape, warmup_steps=20)
    assert long[:10] == short


@pytest.mark.parametrize(
    "schedule, parts",
    [
        ({"shape": "wsd"}, ["schedule", "decay_steps", "10% to 20%"]),
        ({"shape": "cosine", "decay_steps": 5}, ["schedule.decay_steps", "wsd"]),
        ({"shape": "linear", "decay": "sqrt"}, ["schedule.decay", "wsd"]),
        ({"shape": "constant", "final_ratio": 0.1}, ["schedule.final_ratio", "constant"]),
        ({"shape": "inverse_sqrt", "final_ratio": 0.1}, ["schedule.final_ratio", "inverse_sqrt"]),
        ({"shape": "step"}, ["schedule.shape"]),
    ],
)
def test_settings_that_would_be_ignored_are_refused(schedule: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        config(100, **schedule)
    assert all(part in str(refusal.value) for part in parts), refusal.value


WSD = {"shape": "wsd", "warmup_steps": 5, "decay_steps": 20}
CONSTANT = {"shape": "constant", "warmup_steps": 5}


@pytest.mark.parametrize(
    "then, now, done, may",
    [
        ((CONSTANT, 100), (CONSTANT, 900), 100, True),
        ((CONSTANT, 100), (CONSTANT, 90), 90, True),
        ((CONSTANT, 100), (CONSTANT, 90), 91, False),
        ((CONSTANT, 100), (WSD, 100), 80, True),
        ((CONSTANT, 100), (CONSTANT | {"warmup_steps": 6}, 100), 1, False),
        (({"shape": "inverse_sqrt"}, 100), ({"shape": "inverse_sqrt"}, 200), 100, True),
        ((WSD, 100), (WSD, 900), 80, True),
        ((WSD, 100), (WSD, 900), 81, True),  # step 80, the 81st, has the peak: the decay begins after it
        ((WSD, 100), (WSD, 900), 82, False),
        ((WSD, 100), (WSD, 60), 41, True),
        ((WSD, 100), (WSD, 60), 42, False),
        ((WSD, 100), (WSD | {"decay_steps": 10, "decay": "sqrt"}, 100), 81, True),
        ((WSD, 100), (WSD | {"decay_steps": 10, "decay": "sqrt"}, 100), 82, False),
        (({"warmup_steps": 5}, 100), ({"warmup_steps": 5}, 101), 1, False),
        (({"shape": "published"}, 100), (WSD, 100), 0, False),
    ],
)
def test_a_run_goes_on_under_another_schedule_if_its_past_stays(
    then: tuple[dict[str, Any], int], now: tuple[dict[str, Any], int], done: int, may: bool
) -> None:
    made = [(ScheduleConfig.model_validate(schedule), steps) for schedule, steps in (then, now)]
    assert keeps_the_past(made[0], made[1], done) is may


PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


def test_the_pages_table_of_rates() -> None:
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (shape \| 0 |`\w+` \| \d)", line)]
    header, *table = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in table] == list(get_args(ScheduleConfig.model_fields["shape"].annotation))
    for shape, *cells in table:
        made = config(100_000, shape=shape, warmup_steps=4000, **({"decay_steps": 20_000} if shape == "wsd" else {}))
        assert cells == [f"{learning_rate(made, int(step)):.3e}" for step in header[1:]], shape


def test_the_pages_commands_are_legal_and_its_runs_can_go_on_so() -> None:
    commands = re.findall(r"^    deepspeed launch/pretrain\.py ((?:.*\\\n)*.*)", PAGE, re.M)
    made = [
        load_config(ROOT / re.findall(r"--config (\S+)", command)[0], re.findall(r"--set (\S+)", command))
        for command in commands
    ]
    begun, longer, decayed = [(c.schedule, c.train.steps) for c in made]
    assert keeps_the_past(begun, longer, begun[1])
    assert keeps_the_past(longer, decayed, 50_000) and not keeps_the_past(longer, decayed, 50_002)
