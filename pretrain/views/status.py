"""One screen about a run, or a table of runs: what launch/status.py prints."""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from common.run_lock import BEAT_SECONDS
from common.splits import SplitName
from common.strict_json import finite
from common.tables import DOTS, beginning, counted, shortened_apart, text_table
from common.terminal import visible
from common.units import GIB
from pretrain.config.validated import setting
from pretrain.report.event_text import LAST_TIME, event_text
from pretrain.report.source_losses import sources_text
from pretrain.views.jobs import unheard_job
from pretrain.views.next_step import next_text
from pretrain.views.reading import RunView, State
from pretrain.views.text_plot import text_plot

RECENT_STEPS = 50
"""Steps whose mean time gives the throughput and the time left."""
EVENTS = 6
PLOT_ROWS = 9
FEW_EVENTS, LOWEST_PLOT = 2, 4
"""Events for which the curve is lower on a small terminal, and rows for which there are fewer events still."""
TITLES = ("run", "state", "step", "of", "loss", "validation", "s/step", "tokens", "time left", "newest line")
"""Of the table of runs."""
LEFT_OUT_FIRST = ("tokens", "newest line", "s/step", "validation", "of", "time left")
"""Its columns, the least important first; the others are always there."""
LEAST_NAME, SHORTEST_NAME = 16, 7
"""Characters of a run's name for which columns are left out, and that it has in the narrowest terminal."""
MOST_LINES = 6
"""Of one explanation or event."""


def screen(view: RunView, *, width: int, now: float, height: int | None = None) -> str:
    """The run in lines of at most `width` characters, but for the last, which may be copied. now: seconds since the
    epoch. height: lines of the terminal, where what does not fit would push the state out at the top; curve and events
    are shorter then. None: no limit."""
    lines = [f"{view.path}  {view.config.get('description', '')}".rstrip()]
    for name, value in [("state", state_text(view, now)), *rows(view, now)]:
        lines += wrapped(f"{name:<10} {value}", width, indent=11) if value else []
    last = visible(f"next: {next_text(view)}")
    told = [event_text(event, now) for event in view.events if event["event"] != "opened"][-EVENTS:]
    events = [wrapped(f"  {text}", width, indent=4) for text in told]
    # The newest line of the terminal is the cursor's, and the last line of the screen, after a blank one, may wrap.
    room = math.inf if height is None else height - len(lines) - 2 - math.ceil(len(last) / width)
    x, y = view.metrics.column("step"), view.metrics.column("loss")
    high, many = _fitting(room, [len(event) for event in events], has_curve=any(map(math.isfinite, y)))
    plot = text_plot(x, y, width=width, height=high, braille=can_print_braille()) if high else []
    if plot:
        lines += ["", "training loss by step", *plot]
    if many:
        lines += ["", "last events", *(line for event in events[-many:] for line in event)]
    return "\n".join(beginning(visible(line), width) for line in [*lines, ""]) + "\n" + last


def _fitting(room: float, events: Sequence[int], *, has_curve: bool) -> tuple[int, int]:
    """The rows of the curve and the number of events that fit into `room` lines. events: lines of each. The oldest
    events go first, then the curve gets lower."""
    if not has_curve:
        return 0, next((many for many in range(len(events), 0, -1) if 2 + sum(events[-many:]) <= room), 0)
    few = min(FEW_EVENTS, len(events))
    choices = [(PLOT_ROWS, many) for many in range(len(events), few, -1)]
    choices += [(high, few) for high in range(PLOT_ROWS, LOWEST_PLOT - 1, -1)]
    choices += [(LOWEST_PLOT, many) for many in range(few - 1, -1, -1)]
    needed = ((high + 3) + bool(many) * (2 + sum(events[len(events) - many :])) for high, many in choices)
    return next((choice for choice, lines in zip(choices, needed, strict=True) if lines <= room), (0, 0))


def rows(view: RunView, now: float) -> list[tuple[str, str]]:
    """What is known about the run, by name; empty where nothing is."""
    newest = view.metrics.newest
    damaged = view.metrics.damaged + view.damaged_events
    job = unheard_job(view)
    log = view.path / "slurm" / f"{job}.log"
    return [
        ("job", f"{job} has started since, and has not come to open the run so far; its log is {log}" if job else ""),
        ("step", step_text(view)),
        ("time left", left_text(view, now)),
        ("loss", loss_text(view)),
        *((split, validation_text(view, split)) for split in view.splits),
        ("tasks", tasks_text(view)),
        ("speed", speed_text(view)),
        ("experts", balance_text(newest, view.config)),
        ("memory", memory_text(newest)),
        (
            "saved",
            f"{counted(len(view.checkpoints), 'checkpoint')}, newest {view.checkpoints[-1]}"
            if view.checkpoints
            else "",
        ),
        ("damaged", f"{counted(damaged, 'line')} of metrics.jsonl and events.jsonl passed over" if damaged else ""),
    ]


def state_text(view: RunView, now: float) -> str:
    state, sign = view.state, view.sign
    if state.goes_on and sign is not None:
        ranks = view.last("started").get("ranks")
        many = f", {counted(ranks, 'rank')}" if isinstance(ranks, int) and state is State.RUNNING else ""
        return f"{state.value}: {sign.owner}{many}, last sign of life {sign.age:.0f} s ago"
    if state is State.DEAD:
        if not view.events and not len(view.metrics):
            return "dead: nothing was trained here"
        who = f"{sign.owner} was silent for {duration(sign.age)}" if sign is not None else "its process is gone"
        return f"dead: {who}, and it left no outcome"
    when = view.outcome.get("time")
    ago = f", {duration(now - when)} ago" if isinstance(when, int | float) else ""
    reason = view.outcome.get("reason", "no reason is given")
    return f"{state.value}{'' if reason == state.value else f': {reason}'}{ago}"


def step_text(view: RunView) -> str:
    tokens, last = view.metrics.newest.get("tokens"), view.last_step
    text = f"{view.step:,}" + (f" of {last:,} ({view.step / last:.1%})" if last else "")
    return text + (f", {tokens:,.0f} tokens" if isinstance(tokens, int | float) else "")


def seconds_per_step(view: RunView) -> float | None:
    """Mean of the newest steps; None before the first."""
    found = recent(view, "step_seconds")
    return sum(found) / len(found) if found else None


def recent(view: RunView, key: str) -> list[float]:
    """The finite values of the newest steps. They are of one start: an earlier one may have had another batch, layout
    or machine, whose seconds say nothing of this one's speed."""
    begins = (event.get("step") for event in reversed(view.events) if event["event"] == "started")
    begin = next((step for step in begins if isinstance(step, int) and step < view.step), -1)
    steps, values = (view.metrics.column(name)[-RECENT_STEPS:] for name in ("step", key))
    return [value for step, value in zip(steps, values, strict=True) if step > begin and math.isfinite(value)]


def left_text(view: RunView, now: float) -> str:
    seconds, last = seconds_per_step(view), view.last_step
    if not view.state.goes_on or seconds is None or last is None or view.step >= last:
        return ""
    left = seconds * (last - view.step)
    if now + left >= LAST_TIME:
        return duration(left)
    return f"{duration(left)}, until {time.strftime('%Y-%m-%d %H:%M', time.localtime(now + left))}"


def loss_text(view: RunView) -> str:
    """The newest training loss and the mean of the newest ten. Where the newest is not finite, since when."""
    steps, every = view.metrics.column("step"), view.metrics.column("loss")
    if "loss" in view.metrics.newest and not math.isfinite(every[-1]):
        last = next((n for n in range(len(every) - 1, -1, -1) if math.isfinite(every[n])), -1)
        before = f", {every[last]:.4f} before" if last >= 0 else ""
        return f"not finite since step {steps[last + 1]:,.0f}{before}"
    losses = [loss for loss in view.metrics.column("loss")[-10:] if math.isfinite(loss)]
    return (
        f"{losses[-1]:.4f} (mean of {counted(len(losses), 'step')} {sum(losses) / len(losses):.4f})" if losses else ""
    )


def validation_text(view: RunView, split: SplitName) -> str:
    """The newest validation on a split that has one, also of each source of a mixture and of the moving average, and
    the best of those on the same windows."""
    step, loss = view.validations(split)[-1]
    best, lowest = view.best_validation(split) or (step, loss)
    of_sources = dict(view.source_validations(split))[step]
    text = f"{finite_text(loss)} after step {step:,}" + (f" ({sources_text(of_sources)})" if of_sources else "")
    text += "" if best == step else f", best {lowest:.4f} after step {best:,}"
    average = dict(view.average_validations(split)).get(step)
    return text if average is None else f"{text}; moving average {finite_text(average)}"


def _of_split(split: SplitName, loss: float) -> str:
    """A loss in a column of those on the validation split."""
    return finite_text(loss) + ("" if split == "validation" else f" ({split})")


def finite_text(loss: float) -> str:
    """A loss, or that it is none."""
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def tasks_text(view: RunView) -> str:
    """The newest accuracy of each task."""
    found = [(one["step"], name, one.get("accuracy")) for name, one in sorted(view.tasks().items())]
    texts = [f"{name} {value:.1%} after step {step:,}" for step, name, value in found if isinstance(value, int | float)]
    return ", ".join(texts)


def speed_text(view: RunView) -> str:
    seconds, newest = seconds_per_step(view), view.metrics.newest
    if seconds is None:
        return ""
    batch, length = (setting(view.config, key) for key in ("batch.global_sequences", "model.sequence_length"))
    has_sizes = isinstance(batch, int) and isinstance(length, int) and seconds > 0
    parts = [f"{batch * length / seconds:,.0f} tokens/s"] if has_sizes else []
    parts.append(f"{seconds:.3g} s a step")
    waits = recent(view, "data_wait_seconds")
    if waits and seconds > 0 and sum(waits) / len(waits) > 0.05 * seconds:
        parts.append(f"{sum(waits) / len(waits) / seconds:.0%} of it waiting for data")
    rank, behind = slowest_rank(view)
    if rank is not None and seconds > 0 and behind > 0.05 * seconds:
        parts.append(f"rank {rank:.0f} is {behind / seconds:.0%} of it behind the others")
    used, took = newest.get("flops_utilization"), newest.get("step_seconds")
    if isinstance(used, int | float) and isinstance(took, int | float) and seconds > 0:
        parts.append(f"{used * took / seconds:.1%} of the peak FLOP/s")  # of the same steps as the time
    return ", ".join(parts)


def slowest_rank(view: RunView) -> tuple[float | None, float]:
    """Of the newest comparison of ranks since the start: the slowest one, and the seconds that its own work took longer
    than the median rank's. An earlier start may have had other machines."""
    started = view.last("started").get("step")
    columns = (view.metrics.column(key) for key in ("step", "slowest_rank", "slowest_rank_behind_seconds"))
    for step, rank, behind in zip(*(column[::-1] for column in columns), strict=True):
        if not isinstance(started, int) or step <= started:
            break
        if math.isfinite(rank) and math.isfinite(behind):
            return rank, behind
    return None, 0.0


def balance_text(newest: dict[str, Any], config: dict[str, Any]) -> str:
    """The load of the busiest expert of each kind of router in the newest step, in units of the mean load."""
    parts = []
    for kind, name in (("attention", "attention"), ("feedforward", "feed-forward")):
        load, unused = newest.get(f"{kind}_load_max"), newest.get(f"{kind}_unused_experts")
        if not isinstance(load, int | float):
            continue
        is_moa = setting(config, f"model.{kind}.type") == "moa"  # whose heads are its experts
        chosen = "num_heads" if is_moa else "active_experts"
        experts, active = (setting(config, f"model.{kind}.{key}") for key in ("num_experts", chosen))
        has_limit = isinstance(experts, int) and isinstance(active, int) and active > 0
        text = f"{name} {load:.2f}" + (f" of {experts / active:.3g}" if has_limit else "")
        parts.append(text + (f", {unused:.0f} unused" if isinstance(unused, int | float) and unused else ""))
    return f"{'; '.join(parts)} (busiest; 1 is even)" if parts else ""


def memory_text(newest: dict[str, Any]) -> str:
    now, peak = newest.get("memory_bytes"), newest.get("memory_peak_bytes")
    if not isinstance(now, int | float) or not isinstance(peak, int | float):
        return ""
    return f"{now / GIB:.1f} GiB on rank 0, peak {peak / GIB:.1f} GiB"


def runs_table(views: Sequence[RunView], now: float, *, width: int | None = None) -> str:
    """A line per run, of at most `width` characters: the names of the folders stand for their paths, then columns are
    left out, then names lose their middle. width: None: as wide as it is."""
    rows = [_run_row(view, now) for view in views]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    if width is not None and sum(widths) + 2 * len(widths) - 2 > width:
        names = [visible(view.path.resolve().name) for view in views]
        named = names if len(set(names)) == len(names) else [visible(row[0]) for row in rows]
        kept = list(range(len(TITLES)))
        for title in ("", *LEFT_OUT_FIRST):
            kept = [number for number in kept if TITLES[number] != title]
            room = width - sum(2 + widths[number] for number in kept[1:])
            if room >= min(LEAST_NAME, max(map(len, named))):
                break
        short = shortened_apart(named, max(room, SHORTEST_NAME))
        rows = [(name, *(row[number] for number in kept[1:])) for name, row in zip(short, rows, strict=True)]
        return text_table([TITLES[number] for number in kept], rows, left=(0, 1))
    return visible(text_table(TITLES, rows, left=(0, 1)))


def _run_row(view: RunView, now: float) -> tuple[str, ...]:
    seconds, newest = seconds_per_step(view), view.metrics.newest
    tokens = newest.get("tokens")
    validated = view.newest_validation
    try:
        age = duration(now - (view.path / "metrics.jsonl").stat().st_mtime) + " ago"
    except OSError:
        age = "-"
    return (
        str(view.path),
        view.state.value,
        f"{view.step:,}",
        f"{view.last_step:,}" if view.last_step else "-",
        finite_text(view.metrics.column("loss")[-1]) if "loss" in newest else "-",
        _of_split(validated[0], validated[2]) if validated else "-",
        f"{seconds:.3g}" if seconds is not None else "-",
        f"{tokens:,.0f}" if isinstance(tokens, int | float) else "-",
        left_text(view, now).partition(",")[0] or "-",
        age,
    )


def summary(view: RunView) -> dict[str, Any]:
    """The screen's facts for another program."""
    newest = {key: value for key, value in view.metrics.newest.items() if isinstance(value, int | float | None)}
    return {
        "run": str(view.path),
        "state": view.state.value,
        "last_step": view.last_step,
        "newest": newest,
        "seconds_per_step": seconds_per_step(view),
        **_validations(view, "validation", ""),
        **{
            key: value
            for split in view.splits
            if split != "validation"
            for key, value in _validations(view, split, f"{split}_").items()
        },
        "tasks": {
            name: {k: v for k, v in one.items() if k not in ("event", "time")} for name, one in view.tasks().items()
        },
        "checkpoints": view.checkpoints,
        "outcome": view.outcome or None,
        "silent_seconds": None if view.sign is None else view.sign.age,
        "sign_of_life_every_seconds": BEAT_SECONDS,
        "next": next_text(view),
    }


def _validations(view: RunView, split: SplitName, prefix: str) -> dict[str, Any]:
    """Of a split, for another program."""
    return {
        f"{prefix}validations": [[step, finite(loss)] for step, loss in view.validations(split)],
        f"{prefix}best_validation": view.best_validation(split),
        f"{prefix}validations_by_source": [
            [step, {name: finite(loss) for name, loss in losses.items()}]
            for step, losses in view.source_validations(split)
            if losses
        ],
    }


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, hours, days = (int(max(0.0, seconds) // size) for size in (60, 3600, 86400))
    if minutes < 2:
        return f"{max(0.0, seconds):.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def wrapped(line: str, width: int, *, indent: int) -> list[str]:
    """The line in lines of at most `width` characters, those after the first indented. What takes more than MOST_LINES
    loses its middle: it begins with what happened, and ends with what to do."""
    lines = textwrap.wrap(visible(line), max(width, indent + 5), subsequent_indent=" " * indent, break_on_hyphens=False)
    last = (MOST_LINES - 1) // 2
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1 - last], " " * indent + DOTS, *lines[-last:]]


def can_print_braille() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
