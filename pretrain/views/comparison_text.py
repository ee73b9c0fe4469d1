"""A comparison in words: for the terminal, and as tables of its page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from common.splits import SplitName
from common.tables import DOTS, beginning, counted, folded_table, listed, same_letters
from common.terminal import visible
from pretrain.config.validated import MEMORY, WINDOWS, reads_streams, setting
from pretrain.views.comparison import (
    AXES,
    DIGEST,
    Run,
    as_meant,
    bits_per_byte,
    data_digest,
    differences,
    differing_facts,
    losses,
    source_losses_at_end,
    splits_of,
    task_accuracies_at_end,
    validation_losses,
)
from pretrain.views.windows import same_sources

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""Title, header, rows."""
DIFFERS = "What differs"
LIMIT = "evaluate.tasks_limit"
LONGEST = 60
"""Characters of a setting."""
NOT_FINITE = "not finite"
EVERY_STEP = ("loss", "grad_norm")
"""Values that every step has, so one that is missing was not finite."""
CONTEXT = 20
"""Characters that stand before the first one that differs."""


def tables(runs: Sequence[Run], tolerance: float, *, longest: int = LONGEST) -> list[Table]:
    """Everything that is compared. `longest`: characters of a setting."""
    labels = [run.label for run in runs]
    found: list[Table] = []
    if len(runs) > 1:
        rows = [(key, *_shown(values, longest)) for key, values in differing_facts(runs)]
        found.append((DIFFERS, ("setting", *labels), rows))
    how, needs_bits = "by" if len(runs) == 1 else "at equal", _needs_bits(runs)
    for axis, name in AXES.items() if len(runs) > 1 else [("step", AXES["step"])]:
        places = _places(losses(runs, axis))
        title = f"Loss {how} {name}" + (": no stretch of them is in all runs" * (not places))
        found.append((title, (name, *labels), places))
    for split in splits_of(runs):
        name = f"{split.capitalize()} loss"
        found.append((f"{name} {how} steps", ("steps", *labels), _places(validation_losses(runs, split))))
        if needs_bits and (bits := bits_per_byte(runs, split)):
            found.append((f"{split.capitalize()} bits per byte {how} steps", ("steps", *labels), _places(bits)))
        step, sources = source_losses_at_end(runs, split)
        if sources:
            rows = [(source, *_losses(values)) for source, values in sources]
            found.append((f"{name} by source after step {step:,}", ("source", *labels), rows))
    if tasks := task_accuracies_at_end(runs):
        rows = [(task, f"{step:,}", *_accuracies(values)) for task, step, values in tasks]
        found.append(("Accuracy of tasks", ("task", "after step", *labels), rows))
    for other in runs[1:]:
        found.append(_differences(runs[0], other, tolerance))
    return found


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the losses must know."""
    keys = {key for key, _ in differing_facts(runs)}
    other = [key for key in WINDOWS if key in keys]
    if len({reads_streams(run.view.config) for run in runs}) > 1 and MEMORY in keys:
        other.append(MEMORY)
    of_windows = f"{' and '.join(other)} differ: validation losses are of other windows of the text"
    evaluated = [run for run in runs if run.view.task_accuracies()]
    of_tasks = len({setting(run.view.config, LIMIT) for run in evaluated}) > 1 and bool(task_accuracies_at_end(runs))
    return [
        *_notes_on_text(runs, keys),
        *([of_windows] if other and splits_of(runs) else []),
        *([f"{LIMIT} differ: accuracies of tasks are of other examples"] if of_tasks else []),
        *(note for run in runs for split in run.view.splits for note in _notes_on_resumes(run, split)),
    ]


def _notes_on_resumes(run: Run, split: SplitName) -> list[str]:
    """From which step on a resume changed what the validations of a run read."""
    reads = list(run.view.reads(split).items())
    return [
        f"{run.label}: {' and '.join(key for key in now if now[key] != before[key])} changed: {split} losses from step "
        f"{step:,} on are of other windows of the text than those before"
        for (_, before), (step, now) in itertools.pairwise(reads)
        if now != before
    ]


def _notes_on_text(runs: Sequence[Run], keys: Collection[str]) -> list[str]:
    of_text = _other_text(runs, keys)
    if not of_text:
        return []
    if _only_weights(runs, of_text):
        return [
            "the weights of data.sources differ: training losses are of other mixtures, but those of validations of "
            "the same text, unless it was prepared anew"
        ]
    differ = (
        f"{' and '.join(of_text)} differ: losses per token of different texts or tokenizers say little of each other"
    )
    validated = [run for run in runs if run.view.splits]
    without = [run.label for run in validated if not any(map(run.view.bits_per_byte, run.view.splits))]
    if not validated:
        return [differ]
    advice = "bits per byte of validations compare models of different tokenizers on the same text"
    if without:
        advice += f"; those of {listed(without, 3)} are not recorded: python launch/evaluate.py RUN computes them"
    return [f"{differ}; {advice}"]


def _other_text(runs: Sequence[Run], keys: Collection[str]) -> list[str]:
    """What says that runs read other texts or tokens, among the keys of what differs."""
    if None not in (digests := [data_digest(run.view) for run in runs]) and len(set(digests)) == 1:
        return []  # data that lie elsewhere, and rows of the embedding that no piece uses
    return [key for key in (DIGEST, "data.manifest", "data.sources", "model.vocab_size") if key in keys]


def _only_weights(runs: Sequence[Run], of_text: Collection[str]) -> bool:
    """Whether the sources are the same, mixed otherwise."""
    return "data.sources" in of_text and set(of_text) <= {DIGEST, "data.sources"} and _same_sources(runs)


def _needs_bits(runs: Sequence[Run]) -> bool:
    """Whether losses per token do not compare these runs."""
    of_text = _other_text(runs, {key for key, _ in differing_facts(runs)})
    return bool(of_text) and not _only_weights(runs, of_text)


def _same_sources(runs: Sequence[Run]) -> bool:
    """Whether all read several data sets, the same in the same order: then validations read the same windows, whatever
    the weights."""
    every = [as_meant("data.sources", setting(run.view.config, "data.sources")) for run in runs]
    return all(same_sources(every[0], rows) for rows in every)


def _places(rows: Sequence[tuple[float, Sequence[float]]]) -> list[tuple[str, ...]]:
    return [(_place(place), *_losses(values)) for place, values in rows]


def _losses(values: Sequence[float]) -> list[str]:
    """Of all runs; of those after the first with the difference to it."""
    return [_loss(value, values[0], number) for number, value in enumerate(values)]


def text(runs: Sequence[Run], tolerance: float, *, width: int | None = None) -> str:
    """All tables for a terminal of that width, or for a file."""
    noted = [line for note in notes(runs) for line in (f"note: {note}", "")]
    parts = noted if len(runs) == 1 else []  # nothing differs of one
    longest = LONGEST if width is None else min(LONGEST, width // 2)
    for title, header, rows in tables(runs, tolerance, longest=longest):
        parts.append(title)
        parts.append(folded_table(header, rows, width=width) if rows else "  nothing")
        parts.append("")
        if title == DIFFERS:
            parts += noted
    return visible("\n".join(parts[:-1]))


def _differences(first: Run, other: Run, tolerance: float) -> Table:
    common, found = differences(first, other, tolerance)
    title = f"First step at which {other.label} differs from {first.label} ({counted(common, 'step')} of both)"
    if not common:
        return title + ": they have no step in common", ("value",), []
    if not found:
        return title + ": none, every value is the same in every bit", ("value",), []
    header = (
        "value",
        "first step",
        first.label,
        other.label,
        "largest difference (relative)",
        "at step",
        f"over {tolerance:g} from",
    )
    rows = [
        (
            d.key if "/" in d.key else d.key.replace("_", " "),  # behind a / stands a user's name
            f"{d.step:,}",
            *(_number(value, d.key) for value in d.values),
            f"one {'is' if d.key in EVERY_STEP else 'has'} {_number(math.nan, d.key)}"
            if math.isinf(d.largest)
            else f"{d.largest:.2g}",
            f"{d.largest_step:,}",
            "never" if d.beyond is None else f"{d.beyond:,}",
        )
        for d in found
    ]
    return title, header, rows


def _shown(values: Sequence[Any], longest: int) -> list[str]:
    """Each in at most `longest` characters. Of long ones that begin alike, what comes shortly before the first letter
    that differs, or they would look the same."""
    texts = ["-" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    given = [text for value, text in zip(values, texts, strict=True) if value is not None]
    alike = same_letters(given)
    if max(map(len, texts)) <= longest or alike < longest - len(DOTS):
        return [beginning(text, longest) for text in texts]
    begin = alike - min(CONTEXT, longest // 3)
    cut = [DOTS + beginning(text[begin:], longest - len(DOTS)) for text in texts]
    return ["-" if value is None else text for value, text in zip(values, cut, strict=True)]


def _place(value: float) -> str:
    return f"{value:,.0f}" if value < 1e12 else f"{value:.3g}"


def _number(value: float, key: str) -> str:
    if math.isnan(value):
        return NOT_FINITE if key in EVERY_STEP else "none"
    return f"{value:.9g}"


def _accuracies(values: Sequence[float]) -> list[str]:
    """As `_losses`, in percent."""
    shown = ["-" if math.isnan(value) else f"{value:.2%}" for value in values]
    known = [not (number == 0 or math.isnan(value) or math.isnan(values[0])) for number, value in enumerate(values)]
    return [
        f"{text} ({100 * (value - values[0]):+.2f})" if is_known else text
        for text, value, is_known in zip(shown, values, known, strict=True)
    ]


def _loss(value: float, reference: float, number: int) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else NOT_FINITE
    if number == 0 or not math.isfinite(reference):
        return f"{value:.4f}"
    difference = value - reference
    return f"{value:.4f} ({difference:+.4f})" if abs(difference) >= 5e-4 else f"{value:.4f} ({difference:+.1g})"
