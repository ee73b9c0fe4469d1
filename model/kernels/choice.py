"""The backend of every op of a model, chosen once from the configuration before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from model.config import ModelConfig, SigmaMoEConfig
from model.kernels.backend import BACKENDS, resolve


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Resolved backend per op; the default is the readable reference everywhere."""

    route: str = "reference"
    switchhead_value: str = "reference"
    switchhead_output: str = "reference"
    expert_linear: str = "reference"
    sigma_moe: str = "reference"
    linear_cross_entropy: str = "reference"

    @classmethod
    def choose(cls, requested: str, model: ModelConfig, *, device_type: str, dtype: torch.dtype) -> Backends:
        """`requested` (kernels.backend) for every op that has such a backend, `auto` for the others. Raises ValueError
        with the reason where the op has it but cannot use it here."""
        widths = (model.d_model, model.feedforward.expert_size) if isinstance(model.feedforward, SigmaMoEConfig) else ()
        chosen = {}
        for op in (field.name for field in fields(cls)):
            wanted = requested if requested in BACKENDS[op] else "auto"
            chosen[op] = resolve(wanted, op, device_type, dtype=dtype, widths=widths if op == "sigma_moe" else ())
        return cls(**chosen)

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))
