"""Which implementation computes an op: asked for in the configuration, decided once before the first call, logged once.

| backend    | what it is                                                | device     | dtypes                 |
|------------|-----------------------------------------------------------|------------|------------------------|
| reference  | plain PyTorch and its autograd: the specification         | any        | any                    |
| cpu        | rows sorted by expert, GEMMs into preallocated outputs    | CPU        | fp64, fp32, bf16, fp16 |
| grouped_mm | torch.nn.functional.grouped_mm over rows sorted by expert | CPU, CUDA  | fp32, bf16, fp16       |
| dense      | torch.mm over all experts: SwitchHead's two ops, and the  | CPU, CUDA  | fp64, fp32, bf16, fp16 |
|            | backward pass of route                                    |            |                        |
| sets       | Triton by the set of chosen experts, the same two ops;    | CUDA       | fp32, bf16, fp16       |
|            | torch.mm over all experts where a sum goes over heads     |            |                        |
| triton     | our GPU kernels (model/kernels/triton)                    | CUDA       | fp32, bf16, fp16       |
| cuda       | CUDA C++ (model/kernels/cuda): route alone, by name only  | CUDA       | fp32, bf16, fp16       |

The Triton kernels run on CPU tensors too, slowly, where TRITON_INTERPRET=1 was set before anything imported triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from model.kernels.cuda import build

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "route": {
        "cpu": "model.kernels.cpu.route",
        "triton": "model.kernels.triton.route",
        "cuda": "model.kernels.cuda.route",
        "dense": "model.kernels.dense.route",
    },
    "sigma_moe": {
        "cpu": "model.kernels.cpu.sigma_moe",
        "grouped_mm": "model.kernels.grouped_mm.sigma_moe",
        "triton": "model.kernels.triton.sigma_moe",
    },
    "switchhead_value": {
        "cpu": "model.kernels.cpu.switchhead_value",
        "triton": "model.kernels.triton.switchhead_value",
        "dense": "model.kernels.dense.switchhead_value",
        "sets": "model.kernels.sets.switchhead_value",
    },
    "switchhead_output": {
        "cpu": "model.kernels.cpu.switchhead_output",
        "triton": "model.kernels.triton.switchhead_output",
        "dense": "model.kernels.dense.switchhead_output",
        "sets": "model.kernels.sets.switchhead_output",
    },
    "expert_linear": {
        "cpu": "model.kernels.cpu.expert_linear",
        "triton": "model.kernels.triton.expert_linear",
    },
    "relative_attention": {
        "triton": "model.kernels.triton.relative_attention",
    },
    "causal_attention": {
        "triton": "model.kernels.triton.causal_attention",
    },
    "linear_cross_entropy": {
        "cpu": "model.kernels.cpu.linear_cross_entropy",
        "triton": "model.kernels.triton.linear_cross_entropy",
    },
    "elementwise": {
        "cpu": "model.kernels.cpu.elementwise",
        "triton": "model.kernels.triton.elementwise",
    },
}
"""Op -> backend -> the module that computes it, imported at its first call. The module has a function for each body of
the op's file in model/kernels/ops: `forward` and `backward`, of the same arguments in every backend. Where those are
many they are one record, the op's `Inputs`. `elementwise` is several small ops, chosen together: its modules have a
function for each."""

BACKENDS: dict[str, tuple[str, ...]] = {op: ("reference", *modules) for op, modules in IMPLEMENTATIONS.items()}
"""Every op and the backends that it has."""

ADDING: dict[str, tuple[str, ...]] = {"route": ("dense",), "switchhead_value": ("dense", "sets")}
"""Op -> backends whose `backward` takes a `total` too, to which its last product adds the gradient of the input
(model/kernels/op.py, `hand_on`)."""

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS_IN_SETS = 6
"""Experts of a head that `sets` takes: 3 of 6 are 20 sets, and each leaves a tile of tokens partly empty."""
ATTENTION_WIDTHS = {(8, 0): 256, (9, 0): 256, (10, 0): 256}
"""Compute capability -> the widest head whose Triton kernels, of both attentions, pass benchmarks/compiled.py there;
128 on others, where a block has less shared memory."""
PREFERENCE = ("cpu", "triton", "grouped_mm", "reference")
"""What `auto` takes, best first. On the CPU, `triton` is an interpreter that is asked for by name only; so is `cuda`,
which needs nvcc, everywhere; and `sets`. Which ops are `dense` on CUDA is in model/kernels/choice.py."""


def resolve(
    requested: str, op: str, device_type: str, *, dtype: torch.dtype | None = None, widths: Sequence[int] = ()
) -> str:
    """The backend that computes `op` on `device_type`; ValueError with the reason where `requested` cannot.

    `dtype` of the tensors and `widths` (sigma_moe: d_model, expert size; SwitchHead's ops: d_model, head_dim, experts
    of a head, chosen ones; both attentions: head_dim), where given, are checked against the limits of F.grouped_mm
    and of the Triton kernels. `auto` takes the first of `PREFERENCE` that works, and warns where that is not the op's
    fastest on the device.
    """
    if op not in BACKENDS:
        raise ValueError(f"no op {op!r}: there is {', '.join(BACKENDS)}")
    reasons = {name: _why_not(name, op, device_type, dtype, widths) for name in BACKENDS[op]}
    possible = [name for name, reason in reasons.items() if reason is None]
    if requested == "auto":
        # On the CPU `triton` is an interpreter.
        chosen = next(name for name in PREFERENCE if name in possible and (name, device_type) != ("triton", "cpu"))
        if device_type == "cuda" and reasons.get("triton") is not None:
            _warn_slower(op, chosen, str(reasons["triton"]))
    elif requested in possible:
        chosen = requested
    else:
        reason = reasons.get(requested, f"{op} has no such backend")
        raise ValueError(
            f"kernels.backend={requested} cannot compute {op} on {device_type}: {reason}. "
            f"Possible: {', '.join(['auto', *possible])}"
        )
    _log_choice(op, chosen)
    return chosen


def can_compute(backend: str, op: str, device_type: str, dtype: torch.dtype | None, widths: Sequence[int] = ()) -> bool:
    """Whether `resolve` would take this backend for the op."""
    return backend in BACKENDS[op] and _why_not(backend, op, device_type, dtype, widths) is None


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module in which `backend` computes `op`; ValueError for a backend that the op does not have."""
    check_backend(op, backend)
    return importlib.import_module(IMPLEMENTATIONS[op][backend])


def check_backend(op: str, backend: str) -> None:
    """ValueError for a backend that has no module for `op`."""
    if backend not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op} has no backend {backend!r}: there is {', '.join(BACKENDS[op])}")


def _why_not(backend: str, op: str, device_type: str, dtype: torch.dtype | None, widths: Sequence[int]) -> str | None:
    """The reason why `backend` cannot compute `op` here, or None."""
    if backend == "cpu" and device_type != "cpu":
        return "it runs on CPU tensors only"
    if backend == "grouped_mm":
        return grouped_mm_limit(device_type, dtype, widths)
    if backend == "sets":
        return sets_limit(device_type, dtype, widths)
    if backend == "triton":
        limit = triton_limit(device_type, dtype)
        return limit or (attention_limit(device_type, dtype, widths) if op.endswith("_attention") else None)
    if backend == "cuda":
        return cuda_limit(op, device_type, dtype)
    if backend == "dense" and device_type not in ("cpu", "cuda"):
        return f"it was written for CPU and CUDA, not {device_type}"
    if backend == "dense" and op == "route" and device_type == "cuda":
        return triton_limit(device_type, dtype)  # forward it is the Triton kernels
    return None


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on CPU tensors: TRITON_INTERPRET=1, read when they are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_limit(device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if device_type not in ("cpu", "cuda"):
        return f"Triton has no {device_type} kernels here"
    if device_type == "cpu" and not interpreting():
        return "it runs on CUDA; on the CPU only interpreted, with TRITON_INTERPRET=1 set before the start (very slow)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CUDA builds of torch bring it; for the interpreter: pip install triton)"
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return None


def attention_limit(device_type: str, dtype: torch.dtype | None, widths: Sequence[int]) -> str | None:
    """Why the Triton kernels of attention do not take heads of these widths, or None. What they leave out does not fit
    the registers of a GPU."""
    if device_type == "cuda" and dtype == torch.float32:
        return "its Triton kernels take bfloat16 and float16 on CUDA, not torch.float32"
    widest = ATTENTION_WIDTHS.get(cuda_capability(), 128)
    for width in widths:
        if width > widest:
            return f"its Triton kernels take heads of at most {widest} columns here, not {width}"
    return None


def cuda_capability() -> tuple[int, int]:
    """Of the current GPU; (9, 0), that of an H100, without one and before a rank has chosen its own, because to ask
    starts CUDA."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_capability()  # GPU-ONLY cuda-capability
    return 9, 0


def cuda_limit(op: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why model/kernels/cuda/OP.cu cannot run here, or None."""
    if device_type != "cuda":
        return "it runs on CUDA tensors only"
    if dtype == torch.float64:
        return "it computes in float32"
    return build.why_not(op)


def grouped_mm_limit(device_type: str, dtype: torch.dtype | None, widths: Sequence[int]) -> str | None:
    """What F.grouped_mm of torch 2.13 refuses: None where it takes everything (measured on CPU, read for CUDA)."""
    if device_type not in ("cpu", "cuda"):
        return f"F.grouped_mm has no {device_type} kernel"
    if dtype is not None:
        if device_type == "cuda" and dtype != torch.bfloat16:
            return f"F.grouped_mm takes bfloat16 on CUDA, not {dtype}"
        if dtype not in GROUPED_MM_DTYPES:
            return f"F.grouped_mm takes float32, bfloat16 and float16, not {dtype}"
        multiple = 16 // dtype.itemsize
        for width in widths:
            if width % multiple != 0:
                return f"F.grouped_mm needs rows of n * 16 bytes: {width} is no multiple of {multiple} ({dtype})"
    return None


def sets_limit(device_type: str, dtype: torch.dtype | None, widths: Sequence[int]) -> str | None:
    """Why SwitchHead's tokens cannot be grouped by the set of their experts, or None. `widths`: d_model, head_dim,
    experts of a head, chosen ones."""
    limit = triton_limit(device_type, dtype)
    if limit is not None or not widths:
        return limit
    *rows, num_experts, _ = widths
    if num_experts > MOST_EXPERTS_IN_SETS:
        return f"it groups tokens by the sets of at most {MOST_EXPERTS_IN_SETS} experts, not {num_experts}"
    multiple = 16 // (dtype or torch.bfloat16).itemsize if device_type == "cuda" else 1
    odd = [width for width in rows if width % multiple != 0]
    return f"it gathers rows of n * 16 bytes: {odd[0]} is no multiple of {multiple}" if odd else None


@functools.cache
def _log_choice(op: str, backend: str) -> None:
    """Once per (op, backend) in a process, however many layers ask."""
    logger.info("kernels: %s is computed by backend %s", op, backend)


@functools.cache
def _warn_slower(op: str, backend: str, reason: str) -> None:
    logger.warning("kernels: %s takes backend %s, which is slower than triton: %s", op, backend, reason)
