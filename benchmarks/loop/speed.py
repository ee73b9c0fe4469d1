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
from benchmarks.rounds import ratios
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


@dataclass(frozen=True)
class Measured:
    """What one comparison gave."""

    comparison: Comparison
    tokens: int
    """Of a piece."""
    ours: list[Piece]
    theirs: list[Piece]
    losses: list[list[float]]
    """Ours and theirs, of every step."""

    def ratios(self, clock: str) -> list[float]:
        """Of each pair, tokens per second of ours / theirs; `clock`: passed or worked."""
        return ratios(*([getattr(piece, clock) for piece in side] for side in (self.theirs, self.ours)))

    @property
    def loss_difference(self) -> float:
        """The largest relative difference between the losses of a step."""
        return max(abs(own - other) / abs(other) for own, other in zip(*self.losses, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "other": self.comparison.other,
            "zero": self.comparison.zero,
            "wanted": self.comparison.wanted,
            "tokens_of_a_piece": self.tokens,
            "ratio": statistics.median(self.ratios("passed")),
            "ratio_of_processor_time": statistics.median(self.ratios("worked")),
            "ours_seconds": self.ours,
            "theirs_seconds": self.theirs,
            "loss_difference": self.loss_difference,
        }


def config_of(comparison: Comparison, path: Path | None, overrides: list[str]) -> Config:
    """`path`: in the place of the comparison's own configuration. Raises UserError."""
    own = [*SMALLER, *comparison.keys, f"parallel.zero={comparison.zero}"]
    config = load_config(path or Path(comparison.config), [*own, *overrides])
    check_ranks(config, 1)
    return config


def compare(comparison: Comparison, config: Config, device: torch.device, *, pairs: int, steps: int) -> Measured:
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
        for number in range(pairs):
            for kind in list(loops)[:: -1 if number % 2 else 1]:
                pieces[kind].append(timed(loops[kind], steps))
        losses = [loop.losses() for loop in loops.values()]
    tokens = steps * config.batch.global_sequences * config.model.sequence_length
    found = Measured(comparison, tokens, pieces["ours"], pieces["theirs"], losses)
    if not found.loss_difference <= LOSS_TOLERANCE:
        raise UserError(
            f"ours and {comparison.other} do not train the same: a loss differs by {found.loss_difference:.1e} of it"
        )
    return found


def timed(loop: Loop, steps: int) -> Piece:
    start, worked = time.perf_counter(), time.process_time()
    loop.train(steps)
    return Piece(time.perf_counter() - start, time.process_time() - worked)


def run(path: Path | None, overrides: list[str], names: list[str], *, pairs: int, steps: int) -> list[Measured]:
    """Raises UserError."""
    chosen = [comparison for comparison in COMPARISONS if comparison.name in names]
    configs = [config_of(comparison, path, overrides) for comparison in chosen]
    device = devices.start(Ranks.from_environment(), configs[0].train)
    try:
        return [
            compare(comparison, config, device, pairs=pairs, steps=steps)
            for comparison, config in zip(chosen, configs, strict=True)
        ]
    finally:
        devices.stop()


def page(found: Any) -> str:
    """The table of docs/benchmarks.md. A pair has one piece of each loop."""
    rows = []
    for one in found.values():
        pairs = list(zip(one["ours_seconds"], one["theirs_seconds"], strict=True))
        single = [theirs[0] / ours[0] for ours, theirs in pairs]
        ours, theirs = (
            one["tokens_of_a_piece"] / statistics.median(s[0] for s in side) for side in zip(*pairs, strict=True)
        )
        span = f"{min(single):.3f} to {max(single):.3f}"
        ratios = [f"{one[key]:.3f}" for key in ("ratio", "ratio_of_processor_time")]
        rows.append(
            [
                f"{one['other']}, ZeRO {one['zero']}",
                f"{ours:.0f}",
                f"{theirs:.0f}",
                *ratios,
                span,
                f"{one['loss_difference']:.0e}",
                f"{one['wanted']:.2f}: {'held' if one['ratio'] >= one['wanted'] else 'missed'}",
            ]
        )
    return markdown(
        [
            "ours against",
            "ours, tokens/s",
            "theirs",
            "ours / theirs",
            "by processor time",
            "pairs",
            "losses differ by",
            "wanted",
        ],
        rows,
    )


def table(found: list[Measured]) -> str:
    head = f"{'ours against':26} ZeRO  tokens  ours s        theirs s      ours tok/s  theirs  ratio   by CPU  wanted"
    rows = [head]
    for one in found:
        seconds = [[piece.passed for piece in pieces] for pieces in (one.ours, one.theirs)]
        spans = [f"{min(values):.2f} to {max(values):.2f}" for values in seconds]
        speeds = [one.tokens / statistics.median(values) for values in seconds]
        ratios = [statistics.median(one.ratios(clock)) for clock in ("passed", "worked")]
        rows.append(
            f"{one.comparison.other:26} {one.comparison.zero:4}  {one.tokens:6}  {spans[0]:12}  {spans[1]:12}  "
            f"{speeds[0]:10.1f}  {speeds[1]:6.1f}  {ratios[0]:.4f}  {ratios[1]:.4f}  {one.comparison.wanted:.2f}"
        )
        rows.append(
            f"  ratios of {len(one.ours)} pairs: {' '.join(f'{ratio:.3f}' for ratio in one.ratios('passed'))}; by CPU: "
            f"{' '.join(f'{ratio:.3f}' for ratio in one.ratios('worked'))}; losses differ by at most "
            f"{one.loss_difference:.1e} of a loss"
        )
    return "\n".join(rows)
