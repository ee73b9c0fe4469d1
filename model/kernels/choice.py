"""The backend of every op of a model, chosen once from the configuration before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig, XLConfig
from model.kernels.backend import BACKENDS, can_compute, resolve

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a GPU has decided: `kernels.backend=auto` computes `ops` by `backend` on CUDA, in these dtypes, where the
    model's `fact` is `least` to `most`."""

    ops: tuple[str, ...]
    backend: str
    dtypes: tuple[torch.dtype, ...]
    fact: str
    """A key of `facts_of`."""
    least: float
    most: float
    because: str
    """The times, the card and the date; and where nothing was timed."""


MEASURED = (
    Measured(
        ops=("switchhead_value", "switchhead_output"),
        backend="dense",
        dtypes=HALF,
        fact="experts of a choice",
        least=1,
        most=3,
        because="all experts at cuBLAS's rate: at 2, six shapes, both ops took 0.27 to 0.54 of the time of triton, "
        "forward and backward (H200, 2026-11-27); between 2 and 3 nothing was timed, and the flops grow with it",
    ),
    Measured(
        ops=("relative_attention",),
        backend="reference",
        dtypes=(*HALF, torch.float32),
        fact="head_dim of Transformer-XL",
        least=129,
        most=255,
        because="tiles are filled up to 256: 0.53 ms against 0.68 of triton with 132, 2.0 against 3.6 with 146 (H200, "
        "2026-11-27); 256 was not timed",
    ),
    Measured(
        ops=("route",),
        backend="dense",
        dtypes=(torch.bfloat16,),
        fact="d_model",
        least=2048,
        most=math.inf,
        because="forward and backward 0.16 to 0.19 ms against 1.2 to 1.5 of triton (H200, 2026-11-27); at 1024 triton "
        "is faster by 0.02 to 0.03 ms, between nothing was timed",
    ),
)
"""Where the fastest is not the first of `PREFERENCE`; the first line that fits counts. docs/gpu.md has the times.
causal_attention was not timed: Triton is first by arithmetic, for the reference reads a mask and multiplies what that
leaves out."""


def facts_of(model: ModelConfig) -> dict[str, float]:
    """What `MEASURED` asks of a model; what it has not is left out."""
    a = model.attention
    found: dict[str, float] = {"d_model": model.d_model}
    if isinstance(a, SwitchHeadConfig):
        found["experts of a choice"] = a.num_experts / a.active_experts
    if isinstance(model.position, XLConfig):
        found["head_dim of Transformer-XL"] = a.head_dim
    return found


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
            fastest = measured(op, model, dtype) if wanted == "auto" and device_type == "cuda" else wanted
            if fastest != wanted and not can_compute(fastest, op, device_type, dtype, widths.get(op, ())):
                fastest = wanted
            limiting = dtype if computed.get(op, True) else None
            chosen[op] = resolve(fastest, op, device_type, dtype=limiting, widths=widths.get(op, ()))
        return cls(**chosen)

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def measured(op: str, model: ModelConfig, dtype: torch.dtype) -> str:
    """The backend that `MEASURED` gives, or `auto`."""
    facts = facts_of(model)
    fitting = (
        line.backend
        for line in MEASURED
        if op in line.ops and dtype in line.dtypes and line.least <= facts.get(line.fact, -1) <= line.most
    )
    return next(fitting, "auto")
