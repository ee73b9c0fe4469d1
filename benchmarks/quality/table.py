"""The comparison as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import pictures
from benchmarks.marked import with_table
from benchmarks.quality.plan import CONFIGS, SEEDS, STEPS, TUNED_STEPS, Training, chosen_rate, rates
from benchmarks.quality.records import EVERY, Record
from model.costs import attention_memory, formula_parameters, training_flops_per_token
from pretrain.config.loading import load_config

NAMES = {
    "dense": "dense, 8 heads",
    "dense_2heads": "dense, 2 heads",
    "moa": "MoA, 4 of 8",
    "switchhead": "SwitchHead, 2 heads",
    "switchall": "SwitchAll, 2 heads",
}


def table(records: Sequence[Record]) -> str:
    """Markdown: a line for each model, of what is there. Perplexity: mean, and the lowest and highest of the seeds. A
    rate with a star is not the one that the short runs chose, or not yet known to be."""
    losses = {record.name: record.last_loss for record in records}
    notes = []
    rows = [
        "| model | parameters | MFLOP a token | attention floats | rate | seeds | perplexity | spread | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (each for each in SEEDS if any(record.model == each for record in records)):
        config = load_config(CONFIGS / f"{model}.json").model
        rate, chosen = compared_rate(records, model), chosen_rate(model, losses)
        whole = of_model(records, model)
        if rate is not None and rate != chosen:
            notes.append(note(model, losses, rate))
        cells = [NAMES[model], f"{formula_parameters(config).total:,}", f"{training_flops_per_token(config) / 1e6:.1f}"]
        cells += [
            f"{attention_memory(config):,}",
            "" if rate is None else f"{rate:g}" + r"\*" * (rate != chosen),
            f"{len(whole)} of {SEEDS[model]}",
        ]
        if whole:
            spread = [record.perplexity for record in whole]
            cells += [f"{statistics.mean(spread):.2f}", f"{min(spread):.2f} to {max(spread):.2f}"]
            cells += [f"{statistics.median(record.seconds[-1] for record in whole) / 60:.0f}"]
        rows.append("| " + " | ".join([*cells, "", "", ""][:9]) + " |")
    return "\n".join([*rows, *(["", r"\* " + " ".join(notes)] if notes else [])])


def short_table(records: Sequence[Record]) -> str:
    """Markdown: how each model's short runs ended, by learning rate; the lowest loss in bold. Models without are left
    out."""
    short = {(r.model, r.rate): r.last_loss for r in records if r.steps == TUNED_STEPS and r.seed == 0}
    tried = sorted({rate for _, rate in short})
    rows = ["| model | " + " | ".join(f"{rate:g}" for rate in tried) + " |", "|---" * (1 + len(tried)) + "|"]
    for model in SEEDS:
        losses = [short.get((model, rate)) for rate in tried]
        lowest = min((loss for loss in losses if loss is not None and loss == loss), default=None)
        cells = [_cell(loss, lowest) for loss in losses]
        if any(cells):
            rows.append(f"| {NAMES[model]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(loss: float | None, lowest: float | None) -> str:
    if loss is None:
        return ""
    text = "failed" if loss != loss else f"{loss:.3f}"
    return f"**{text}**" if loss == lowest else text


def note(model: str, losses: dict[str, float], rate: float) -> str:
    """What the short runs of a model say of a rate that they did not choose, or do not choose yet."""
    short = {each: losses.get(Training(model, each, 0, TUNED_STEPS).name) for each in (*rates(model, losses), rate)}
    said = [f"{each:g} not tried" for each, loss in short.items() if loss is None]
    ended = {each: loss for each, loss in short.items() if loss is not None and loss == loss}
    best = min(ended, key=lambda each: ended[each], default=rate)
    if rate in ended and best != rate:
        said.insert(0, f"in short runs {best:g} was better by {ended[rate] - ended[best]:.2f} nats")
    return f"{NAMES[model]}: {', '.join(said)}."


def compared_rate(records: Sequence[Record], model: str) -> float | None:
    """That of the compared runs: the chosen one, or else the best by short runs of those that have long ones."""
    losses = {record.name: record.last_loss for record in records}
    chosen = chosen_rate(model, losses)
    long = {r.rate for r in records if r.model == model and r.steps == STEPS}
    if chosen in long or not long:
        return chosen
    return min(long, key=lambda rate: (losses.get(Training(model, rate, 0, TUNED_STEPS).name, math.inf), rate))


def origins(records: Sequence[Record]) -> str:
    """On what the runs of the table were made, a line for each machine and text."""
    found: dict[tuple[str, ...], int] = {}
    for record in (one for model in SEEDS for one in of_model(records, model)):
        keys = ("processor", "torch", "deepspeed", "began", "data")
        on = tuple(record.origin.get(key, "unknown") for key in keys)
        found[on] = found.get(on, 0) + 1
    return "\n".join(
        f"{count} runs: {card}, torch {torch}, DeepSpeed {deepspeed}, {date}; data set {data}."
        for (card, torch, deepspeed, date, data), count in sorted(found.items())
    )


def page(text: str, records: Sequence[Record], mark: str) -> str:
    """`text` with the report between its two marks anew. Raises ValueError if it lacks them."""
    return with_table(text, mark, report(records))


def report(records: Sequence[Record]) -> str:
    """Markdown: where the runs were made, the comparison, and the short runs that chose its rates."""
    tokens = next((r.tokens_per_step * r.steps / 1e6 for r in records if r.steps == TUNED_STEPS), 0)
    short = f"Validation loss after {tokens:.2f} million tokens, by learning rate:\n\n{short_table(records)}"
    return f"{origins(records)}\n\n{table(records)}" + (f"\n\n{short}" if tokens else "")


def of_model(records: Sequence[Record], model: str) -> list[Record]:
    """Its compared runs, all with one learning rate."""
    rate = compared_rate(records, model)
    return [r for r in records if r.model == model and r.steps == STEPS and r.rate == rate and not r.diverged]


def picture(records: Sequence[Record], path: Path) -> None:
    """PNG: validation perplexity against tokens, training FLOPs and minutes; a line for each run."""
    with pictures.picture(path, 3, (13, 4), sharey=True) as (_, axes):
        from matplotlib.ticker import ScalarFormatter  # here: matplotlib takes a second

        for color, model in enumerate(SEEDS):
            for number, record in enumerate(of_model(records, model)):
                tokens = [step * record.tokens_per_step for step, _ in record.validations]
                values = [math.exp(loss) for _, loss in record.validations]
                minutes = [record.seconds[step // EVERY - 1] / 60 for step, _ in record.validations]
                flops = [count * record.flops_per_token for count in tokens]
                for axis, across in zip(axes, (tokens, flops, minutes), strict=True):
                    label = NAMES[model] if number == 0 else None
                    axis.plot(across, values, "o-", color=f"C{color}", markersize=3, linewidth=1, label=label)
        for axis, label in zip(axes, ("tokens", "training FLOPs", "minutes of training"), strict=True):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("validation perplexity")
        axes[0].set_yscale("log")
        for of_axis in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            of_axis(ScalarFormatter())  # 60 and not 6 x 10^1
        if axes[0].lines:
            axes[0].legend()
