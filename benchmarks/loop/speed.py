"""Tokens per second of two loops, in turns."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.loop.loops import Bare, EngineAlone, Given, Loop, Peer, our_loop
from benchmarks.loop.nanogpt import NanoGPT
from benchmarks.marked import markdown
from benchmarks.rounds import orders, ratio, ratios
from common.errors import UserError
from pretrain import device as devices
from pretrain.config.loading import load_config
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.ranks import Ranks

SMALLER = (
    "train.device=cpu",
    "train.precision=fp32",
    "batch.global_sequences=4",
    "batch.micro_sequences=4",
    "model.sequence_length=128",
    "data.max_tokens=null",
    "evaluate.sequences=0",
    "monitor.details_every_steps=0",
)
"""What makes a step of the 47M shape a matter of seconds on one core. The details of the monitor, in every 100th step,
are measured by benchmarks.monitoring."""
LOSS_TOLERANCE = 1e-3
"""Relative. Some ten steps of rounding in another order stay far below it."""
WARM_UP_STEPS = 2
"""Of each loop: they allocate, and tell what is told once."""


class Piece(NamedTuple):
    """Some steps of one loop."""

    passed: float
    """Seconds."""
    worked: float
    """Seconds of processors, in all threads."""


@dataclass(frozen=True)
class Comparison:
    """Ours against another loop."""

    name: str
    zero: int
    other: str
    wanted: float
    """Least ratio of tokens per second, ours / theirs."""
    make: Callable[[Given, torch.device], Peer]
    config: str = "configs/paper/c4_switchhead_47m.json"
    keys: tuple[str, ...] = ()
    """Of its configuration, as overrides."""


COMPARISONS = (
    Comparison("bare", 0, "a bare PyTorch loop", 0.97, Bare),
    Comparison("engine", 1, "DeepSpeed's engine alone", 0.99, EngineAlone),
    Comparison(
        "nanogpt",
        0,
        "nanoGPT's loop, dense 45M",
        0.97,
        NanoGPT,
        "configs/paper/c4_dense_rope_45m.json",
        ("model.dropout=0.0", "data.order=shuffled"),
    ),
)


def kept(
    comparison: Comparison, tokens: int, ours: list[Piece], theirs: list[Piece], losses: list[list[float]]
) -> dict[str, Any]:
    """What one comparison gave. `tokens`: of a piece; `losses`: ours and theirs, of every step. Ratios are those of
    tokens per second, ours / theirs, medians over pairs."""
    return {
        "other": comparison.other,
        "zero": comparison.zero,
        "wanted": comparison.wanted,
        "tokens_of_a_piece": tokens,
        "ratio": ratio([piece.passed for piece in theirs], [piece.passed for piece in ours]),
        "ratio_of_processor_time": ratio([piece.worked for piece in theirs], [piece.worked for piece in ours]),
        "ours_seconds": ours,
        "theirs_seconds": theirs,
        "loss_difference": max(abs(own - other) / abs(other) for own, other in zip(*losses, strict=True)),
    }


def config_of(comparison: Comparison, path: Path | None, overrides: list[str]) -> Config:
    """`path`: in the place of the comparison's own configuration. Raises UserError."""
    own = [*SMALLER, *comparison.keys, f"parallel.zero={comparison.zero}"]
    config = load_config(path or Path(comparison.config), [*own, *overrides])
    check_ranks(config, 1)
    return config


def compare(comparison: Comparison, config: Config, device: torch.device, *, pairs: int, steps: int) -> Any:
    """Trains both in turns, as ABBA: what makes the machine slower from minute to minute meets both. The process group
    must exist."""
    given = Given(config, WARM_UP_STEPS + pairs * steps)
    pieces: dict[str, list[Piece]] = {"ours": [], "theirs": []}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
        our_loop(config, Path(folder) / "run", device) as ours,
        contextlib.closing(comparison.make(given, device)) as theirs,
    ):
        loops: dict[str, Loop] = {"ours": ours, "theirs": theirs}
        for loop in loops.values():
            loop.train(WARM_UP_STEPS)
        for kind in orders(list(loops), pairs):
            pieces[kind].append(timed(loops[kind], steps))
        losses = [loop.losses() for loop in loops.values()]
    tokens = steps * config.batch.global_sequences * config.model.sequence_length
    found = kept(comparison, tokens, **pieces, losses=losses)
    if not (off := found["loss_difference"]) <= LOSS_TOLERANCE:
        raise UserError(f"ours and {comparison.other} do not train the same: a loss differs by {off:.1e} of it")
    return found


def timed(loop: Loop, steps: int) -> Piece:
    start, worked = time.perf_counter(), time.process_time()
    loop.train(steps)
    return Piece(time.perf_counter() - start, time.process_time() - worked)


def run(path: Path | None, overrides: list[str], names: list[str], *, pairs: int, steps: int) -> dict[str, Any]:
    """What is kept of each comparison. Raises UserError."""
    chosen = [comparison for comparison in COMPARISONS if comparison.name in names]
    configs = [config_of(comparison, path, overrides) for comparison in chosen]
    device = devices.start(Ranks.from_environment(), configs[0].train)
    try:
        return {
            comparison.name: compare(comparison, config, device, pairs=pairs, steps=steps)
            for comparison, config in zip(chosen, configs, strict=True)
        }
    finally:
        devices.stop()


HEADER = ["ours against", "ours, tokens/s", "theirs", "ours / theirs", "by processor time", "pairs", "losses differ by"]
HEADER += ["wanted"]


def rows(found: Any) -> list[list[str]]:
    """A line for each comparison: medians. A pair has one piece of each loop."""
    lines = []
    for one in found.values():
        ours, theirs = ([piece[0] for piece in one[f"{side}_seconds"]] for side in ("ours", "theirs"))
        each = ratios(theirs, ours)
        speeds = [f"{one['tokens_of_a_piece'] / statistics.median(seconds):.0f}" for seconds in (ours, theirs)]
        middle = [f"{one[key]:.3f}" for key in ("ratio", "ratio_of_processor_time")]
        line = [f"{one['other']}, ZeRO {one['zero']}", *speeds, *middle, f"{min(each):.3f} to {max(each):.3f}"]
        held = "held" if one["ratio"] >= one["wanted"] else "missed"
        lines.append([*line, f"{one['loss_difference']:.0e}", f"{one['wanted']:.2f}: {held}"])
    return lines


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(HEADER, rows(found))
