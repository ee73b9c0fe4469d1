"""The backend of every op of a model, chosen once from the configuration before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig, XLConfig
from model.kernels.backend import BACKENDS, resolve


class ProjectionShape(NamedTuple):
    """The shape of SwitchHead's projections, those of all tensor-parallel ranks together."""

    d_model: int
    num_heads: int
    head_dim: int
    num_experts: int
    active_experts: int


ON_CUDA: dict[ProjectionShape, str] = {
    # To be measured on a GPU, all of them: `triton`, the default of every other shape, or `dense`.
    ProjectionShape(1024, 4, 112, 4, 2): "triton",  # c4_switchhead_262m
    ProjectionShape(2048, 8, 128, 4, 2): "triton",  # switchall_1b
    ProjectionShape(412, 2, 76, 5, 3): "triton",  # c4_switchhead_47m
    ProjectionShape(1024, 2, 132, 8, 4): "triton",  # wt103_switchhead_262m
    ProjectionShape(128, 4, 32, 4, 2): "triton",  # switchall_tiny
}
"""What `kernels.backend=auto` takes on CUDA for `switchhead_value` and `switchhead_output`, in half precision. The one
place that a measurement changes."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Resolved backend per op; the default is the readable reference everywhere."""

    route: str = "reference"
    switchhead_value: str = "reference"
    switchhead_output: str = "reference"
    expert_linear: str = "reference"
    sigma_moe: str = "reference"
    relative_attention: str = "reference"
    linear_cross_entropy: str = "reference"
    elementwise: str = "reference"

    @classmethod
    def choose(cls, requested: str, model: ModelConfig, *, device_type: str, dtype: torch.dtype) -> Backends:
        """`requested` (kernels.backend) for every op that has such a backend, `auto` for the others. Raises ValueError
        with the reason where the op has it but cannot use it here."""
        widths: dict[str, tuple[int, ...]] = {}
        if isinstance(model.feedforward, SigmaMoEConfig):
            widths["sigma_moe"] = model.d_model, model.feedforward.expert_size
        if isinstance(model.attention, SwitchHeadConfig):
            a = model.attention
            of_heads: tuple[int, ...] = model.d_model, a.head_dim, a.num_experts, a.active_experts
            widths |= dict.fromkeys(("switchhead_value", "switchhead_output"), of_heads)
        if isinstance(model.position, XLConfig):
            widths["relative_attention"] = (model.attention.head_dim,)
        chosen = {}
        for op in (field.name for field in fields(cls)):
            wanted = requested if requested in BACKENDS[op] else "auto"
            if wanted == "auto" and op.startswith("switchhead") and device_type == "cuda" and dtype.itemsize == 2:
                wanted = _measured(model)
            chosen[op] = resolve(wanted, op, device_type, dtype=dtype, widths=widths.get(op, ()))
        return cls(**chosen)

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def _measured(model: ModelConfig) -> str:
    """The backend of `ON_CUDA` for SwitchHead's ops. `auto` for `triton`, which it prefers: where that cannot run, it
    takes another and says why."""
    a = model.attention
    if not isinstance(a, SwitchHeadConfig):
        return "auto"
    shape = ProjectionShape(model.d_model, a.num_heads, a.head_dim, a.num_experts, a.active_experts)
    found = ON_CUDA.get(shape, "triton")
    return "auto" if found == "triton" else found
