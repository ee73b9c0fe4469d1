"""What an import writes: the same for every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pretrain.checkpoint.weights import WeightsOrigin


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Weights of another program under our names."""

    origin: WeightsOrigin
    tensors: dict[str, Callable[[], Tensor]]
    """By canonical name: functions that give the whole parameter, fp32."""
    ignored: list[str] = field(default_factory=list)
    """Keys of the source that no output depends on."""
