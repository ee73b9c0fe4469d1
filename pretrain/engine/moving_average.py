"""An exponential moving average of the weights while training (train.ema_decay; Polyak and Juditsky 1992).

It costs 4 bytes per parameter where the fp32 master weights lie: divided over the ranks by ZeRO 1 to 3, in CPU memory
with parallel.offload_optimizer. It begins as a copy of the weights; nothing corrects for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.zero_state import keep_average, refresh_weights

BLOCK_ELEMENTS = 1 << 24
"""Exchanged at a time; the exchange takes no more memory than this, in fp32."""


class MovingAverage:
    """a <- decay a + (1 - decay) w after every update of a weight w, on the rank that owns it."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._pairs = keep_average(engine)

    @torch.no_grad()
    def update(self, grad_norm: Tensor) -> None:
        """After an optimizer step whose gradient norm (a scalar on the device) says whether it updated the weights: a
        norm that is not finite leaves the average as it was. The host waits for nothing."""
        share = torch.where(torch.isfinite(grad_norm), 1.0 - self._decay, 0.0).float()
        for average, master in self._pairs:
            average.lerp_(master, share.to(average.device))

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average inside the block, and with the weights again after it, bit by bit. No
        step may be taken inside. Collective, so an error inside, of one rank alone perhaps, ends the run as it is:
        putting the weights back would wait for the other ranks, and nobody would hear of the error."""
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in self._pairs:
            for ours, theirs in zip(*(t.view(-1).split(BLOCK_ELEMENTS) for t in (average, master)), strict=True):
                kept = theirs.clone()
                theirs.copy_(ours)
                ours.copy_(kept)
        refresh_weights(self._engine)
