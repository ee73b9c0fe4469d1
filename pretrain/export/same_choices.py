"""An export takes the choices of the checkpoint's routers where rounding decides between two experts.

Both sides round differently. Of a million choices some are between experts whose scores are closer than that, and one
that falls the other way moves every logit behind it, so that a sound export of a large model would be called wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.tables import counted
from model.language_model import LanguageModel, routing_statistics
from model.routing import Place

TIE = 1e-5
"""How far the score of an expert that is taken may be from that of the one for which it is: as far as logits may
differ. Of the 1.1B model the one that was taken had the same score in fp32."""


class Kept:
    """What one router of the checkpoint's model chose for each token of a text, which it reads in passes. The tokens of
    its memory, which it routes again, keep the experts that they had."""

    def __init__(self, passes: Sequence[int]) -> None:
        """`passes`: numbers of new tokens."""
        self.replaces = len(passes) > 1
        self._passes = list(passes)
        self.index: Tensor | None = None
        """[1, tokens, H, k] int64, best first."""

    def settle(self, own: Tensor, logits: Tensor, place: Place, *, is_repeated: bool) -> Tensor:
        memory = own.shape[1] - self._passes.pop(0)
        new = own[:, memory:]
        self.index, before = new if self.index is None else torch.cat([self.index, new], 1), self.index
        return own if before is None or not memory else torch.cat([before[:, before.shape[1] - memory :], new], 1)


@contextlib.contextmanager
def kept_choices(model: LanguageModel, passes: Sequence[int]) -> Iterator[dict[str, Kept]]:
    """While it is open the routers of `model`, which is not in training, keep what they choose for the one text that it
    reads: by their names, in the order in which an export asks its own."""
    routers = dict(routing_statistics(model))
    kept = {name: Kept(passes) for name in sorted(routers, key=_order)}
    try:
        for name, statistics in routers.items():
            statistics.choices_in_use = kept[name]
        yield kept
    finally:
        for statistics in routers.values():
            statistics.choices_in_use = None


def _order(name: str) -> tuple[int, str]:
    """Of blocks.3.attention.value: layer by layer, and in a layer by name."""
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


class Taken:
    """What the export's routers took over of `kept`."""

    def __init__(self, kept: dict[str, Kept]) -> None:
        self._waiting = list(kept.items())
        self.tokens = 0
        """Of all routers and heads, those for which they had chosen other experts."""
        self.furthest, self.router = 0.0, ""
        """The largest distance of scores between the experts chosen there and here, and where that was."""

    @property
    def wrong(self) -> str:
        """Which router chooses other experts by itself, for a message."""
        if self.furthest <= TIE:
            return ""
        return f" ({self.router.removesuffix('statistics').rstrip('._')} chooses experts {self.furthest:.1e} apart)"

    @property
    def told(self) -> str:
        """What was taken over, for a message."""
        return f" (rounding decides {counted(self.tokens, 'choice')} of experts, taken as there)" if self.tokens else ""

    def __call__(self, gates: Tensor, index: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """`gates` [..., R, E], `index` [..., R, k] and `scores` [..., R, E] of the next router -> gates and index, with
        the kept choice where it is another one by no more than TIE."""
        name, kept = self._waiting.pop(0)
        assert kept.index is not None
        other = kept.index.reshape(index.shape)
        differs = (other[..., :, None] != index[..., None, :]).all(-1).any(-1)  # [..., R]
        if not bool(differs.any()):
            return gates, index
        # Of the last one that each side chose: the other one has been better by this, here or there.
        last, others_last = (scores.gather(-1, chosen).amin(-1) for chosen in (index, other))
        distance = (last - others_last)[differs].abs().max().item()
        self.tokens += int(differs.sum())
        if not distance <= self.furthest:
            self.furthest, self.router = distance, name
        if not distance <= TIE:
            return gates, index
        index = torch.where(differs[..., None], other, index)
        return torch.zeros_like(gates).scatter(-1, index, scores.gather(-1, index)), index


@contextlib.contextmanager
def taking(kept: dict[str, Kept]) -> Iterator[Taken]:
    """While it is open, the one export that reads the same text in one pass takes `kept` where rounding decides."""
    from pretrain.export import layers_switchall

    own, taken = layers_switchall.gates_of, Taken(kept)

    def gates_of(x: Tensor, selector: Tensor, k: int, dropout: float, *, zeroed: bool = False) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(torch.einsum("...d,red->...re", x.float(), selector.float()))
        return taken(*own(x, selector, k, dropout, zeroed=zeroed), scores)

    layers_switchall.gates_of = gates_of
    try:
        yield taken
    finally:
        layers_switchall.gates_of = own
