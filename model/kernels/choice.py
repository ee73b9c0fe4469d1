"""The backend of every op of a model, chosen once from the configuration before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig, XLConfig
from model.kernels.backend import BACKENDS, can_compute, resolve

MOST_EXPERTS_OF_A_CHOICE = 3
"""On CUDA in half precision `kernels.backend=auto` computes SwitchHead's projections as `dense`, all E experts at
cuBLAS's rate, up to this many experts for each of the k chosen: E <= 3 k. At E = 2 k, six shapes, both
ops took 0.27 to 0.54 of the time of `triton`, forward and backward (H200, 2026-11-27, docs/gpu.md); between 2 and 3
nothing was timed, and its flops grow with E / k."""


SLOW_HEADS = range(129, 256)
"""On CUDA `auto` computes Transformer-XL attention with heads of so many columns by torch's operators: 0.53 ms against
0.68 with 132, 2.0 against 3.6 with 146 (H200, 2026-11-27), whose tiles are filled up to 256. 256 was not timed."""
ROUTER_WIDTH = 2048
"""From this d_model on `auto` computes routing by `dense` on CUDA in bf16: forward and backward 0.16 to 0.19 ms against
1.2 to 1.5 of `triton` (H200, 2026-11-27). At 1024 `triton` is faster by 0.02 to 0.03 ms; between nothing was timed."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Resolved backend per op; the default is the readable reference everywhere."""

    route: str = "reference"
    switchhead_value: str = "reference"
    switchhead_output: str = "reference"
    expert_linear: str = "reference"
    sigma_moe: str = "reference"
    relative_attention: str = "reference"
    causal_attention: str = "reference"
    linear_cross_entropy: str = "reference"
    elementwise: str = "reference"

    @classmethod
    def choose(
        cls,
        requested: str,
        model: ModelConfig,
        *,
        device_type: str,
        dtype: torch.dtype,
        document_mask: bool = False,
    ) -> Backends:
        """`requested` (kernels.backend) for every op that has such a backend, `auto` for the others. `document_mask`:
        whether batches come with documents (data.document_mask). Raises ValueError with the reason where the op has it
        but cannot use it here. What an attention cannot take matters only where the model computes it."""
        widths: dict[str, tuple[int, ...]] = {}
        if isinstance(model.feedforward, SigmaMoEConfig):
            widths["sigma_moe"] = model.d_model, model.feedforward.expert_size
        if isinstance(model.attention, SwitchHeadConfig):
            a = model.attention
            of_heads: tuple[int, ...] = model.d_model, a.head_dim, a.num_experts, a.active_experts
            widths |= dict.fromkeys(("switchhead_value", "switchhead_output"), of_heads)
        has_xl = isinstance(model.position, XLConfig)
        computed = {
            "relative_attention": has_xl,
            "causal_attention": not has_xl and (document_mask or model.memory_length > 0),
        }
        widths |= {op: (model.attention.head_dim,) for op, is_computed in computed.items() if is_computed}
        chosen = {}
        for op in (field.name for field in fields(cls)):
            wanted = requested if requested in BACKENDS[op] else "auto"
            fastest = _measured(op, model, dtype) if wanted == "auto" and device_type == "cuda" else wanted
            if fastest != wanted and not can_compute(fastest, op, device_type, dtype, widths.get(op, ())):
                fastest = wanted
            limiting = dtype if computed.get(op, True) else None
            chosen[op] = resolve(fastest, op, device_type, dtype=limiting, widths=widths.get(op, ()))
        return cls(**chosen)

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def _measured(op: str, model: ModelConfig, dtype: torch.dtype) -> str:
    """What an H200 computed fastest, where that is not the first of `PREFERENCE`; else `auto`. causal_attention was not
    timed: Triton is first by arithmetic, for the reference reads a mask and multiplies what that leaves out."""
    a = model.attention
    if op.startswith("switchhead") and isinstance(a, SwitchHeadConfig):
        few = a.num_experts <= MOST_EXPERTS_OF_A_CHOICE * a.active_experts
        return "dense" if few and dtype.itemsize == 2 else "auto"
    if op == "relative_attention" and isinstance(model.position, XLConfig) and a.head_dim in SLOW_HEADS:
        return "reference"
    wide = model.d_model >= ROUTER_WIDTH
    return "dense" if op == "route" and wide and dtype == torch.bfloat16 else "auto"
