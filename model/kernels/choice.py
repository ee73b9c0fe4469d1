"""The backend of every op of a model, chosen once from the configuration before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig, XLConfig
from model.kernels.backend import BACKENDS, resolve

MOST_EXPERTS_OF_A_CHOICE = 3
"""On CUDA in half precision `kernels.backend=auto` computes SwitchHead's projections as `dense`, all E experts at
cuBLAS's rate, up to this many experts for each of the k chosen: E <= 3 k. At E = 2 k, six shapes, it took 0.27 to 0.55
of the time of `triton`, forward and backward (H200, 2026-11-27, docs/gpu.md); its flops grow with E / k."""


WIDEST_FAST_HEAD = 128
"""On CUDA `auto` computes Transformer-XL attention with wider heads by torch's operators: 0.53 ms against 0.68 with
heads of 132 columns, 2.0 against 3.6 with 146 (H200, 2026-11-27)."""


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
            if wanted == "auto" and device_type == "cuda":
                wanted = _measured(op, model, dtype)
            chosen[op] = resolve(wanted, op, device_type, dtype=dtype, widths=widths.get(op, ()))
        return cls(**chosen)

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def _measured(op: str, model: ModelConfig, dtype: torch.dtype) -> str:
    """What an H200 computed fastest, where that is not the first of `PREFERENCE`; else `auto`."""
    a = model.attention
    if op.startswith("switchhead") and isinstance(a, SwitchHeadConfig):
        few = a.num_experts <= MOST_EXPERTS_OF_A_CHOICE * a.active_experts
        return "dense" if few and dtype.itemsize == 2 else "auto"
    if op == "relative_attention" and isinstance(model.position, XLConfig) and a.head_dim > WIDEST_FAST_HEAD:
        return "reference"
    return "dense" if op == "route" and dtype == torch.bfloat16 else "auto"
