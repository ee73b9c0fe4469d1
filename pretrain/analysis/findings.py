"""What was found about one run, as pictures, page and numbers show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.config import MoAConfig, ModelConfig
from pretrain.analysis.counting import Counts, Favourite, favourites
from pretrain.analysis.trace import RouterTrace, Trace


@dataclass
class Findings:
    """Of one checkpoint and one text."""

    label: str
    """Tells the runs apart; no two have the same."""
    place: Path
    """The checkpoint."""
    step: int
    model: ModelConfig
    num_parameters: int
    tokens: np.ndarray
    """int64 [N]: ids of the text."""
    pieces: list[str]
    """What each of them stands for."""
    layers: list[int]
    """Those that are drawn."""
    trace: Trace
    of_average: bool = False
    """Whether the weights are the moving average (train.ema_decay)."""
    counts: list[Counts] = field(default_factory=list)
    """One for each of trace.routers."""
    favourites: dict[str, list[list[list[Favourite]]]] = field(default_factory=dict)
    """Of each router by name: for each head, for each expert."""

    def __post_init__(self) -> None:
        self.counts = [Counts.of(router) for router in self.trace.routers]
        self.favourites = {
            router.name: [favourites(router, self.tokens, head) for head in range(len(counts.load))]
            for router, counts in zip(self.trace.routers, self.counts, strict=True)
        }

    @property
    def title(self) -> str:
        return f"{self.label}, step {self.step:,}{', moving average' * self.of_average}"

    @property
    def map_name(self) -> str:
        """What one attention matrix belongs to: MoA has one for each of a token's chosen experts."""
        return "choice" if isinstance(self.model.attention, MoAConfig) else "head"

    @property
    def map_layers(self) -> list[int]:
        """Of the drawn layers those that have maps: none where attention lacks them."""
        return [layer for layer in self.layers if layer in self.trace.maps]

    def routers_of(self, layer: int) -> list[tuple[RouterTrace, Counts]]:
        return [pair for pair in zip(self.trace.routers, self.counts, strict=True) if pair[0].layer == layer]

    def kinds(self) -> dict[str, list[tuple[RouterTrace, Counts]]]:
        """All routers by title, in the order of the first layer."""
        found: dict[str, list[tuple[RouterTrace, Counts]]] = {}
        for router, counts in zip(self.trace.routers, self.counts, strict=True):
            found.setdefault(router.title, []).append((router, counts))
        return found

    def drawn(self, count: int) -> slice:
        """The tokens from the first query of the maps on, `count` at most."""
        first = self.trace.first_query
        return slice(first, min(first + count, len(self.tokens)))


def shown(piece: str) -> str:
    """A piece as a label: blanks as SentencePiece's sign, control characters as symbols or codes."""
    names = {" ": "\u2581", "\n": "\u23ce", "\t": "\u21e5"}
    return "".join(names.get(c) or (c if c.isprintable() else f"<{ord(c):02X}>") for c in piece) or "<empty>"
