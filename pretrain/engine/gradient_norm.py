"""The gradient norm, ours where DeepSpeed has none or a slower one, and what makes it show a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.replaced import replaced
from model.parallel.context import ParallelContext

ROW = 512
"""Elements that are summed in fp32."""


def poisoned_unless_finite(objective: Tensor, sequence_loss: Tensor) -> Tensor:
    """`objective` (scalar) unchanged, bit by bit; but if it or an element of `sequence_loss` is not finite, every
    gradient is NaN. Such a loss then stops the update on every rank through the gradient norm, which all ranks share,
    and host and device need not synchronise."""
    poison = sum(
        (0.0 * loss.detach().float().sum() for loss in (objective, sequence_loss)),
        torch.zeros((), device=objective.device),
    )
    return objective * (1.0 + poison)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all elements of `tensors` (one or more, of any shapes, on one device): a scalar in fp64. Its root is right
    to 1e-7.

    torch's own fp32 norm is not enough for that: of an 8000 x 128 embedding it is off by 1.1e-5 on a CPU, of 4 million
    elements by 7e-5, and clipping scales by the norm. Its fp64 norm costs a CPU twenty times as much as one reading of
    the gradients, so there fp32 tensors are summed in rows: fp32 within a row, fp64 over rows. A row of which the norm
    is beyond 1.8e19 is then infinite, and such an update is dropped."""
    if tensors[0].device.type == "cpu" and all(tensor.dtype == torch.float32 for tensor in tensors):
        return torch.stack([_in_rows(tensor) for tensor in tensors]).sum()
    # RELIES-ON torch-foreach
    return (torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)) ** 2).sum()


def _in_rows(tensor: Tensor) -> Tensor:
    """The sum of an fp32 tensor's squares: scalar, fp64."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = [flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)]
    return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in rows]).double().square().sum()


def zero_if_finite(tensors: list[Tensor]) -> Tensor:
    """A scalar in fp64 that adds nothing to a norm, but makes it no number where an element of `tensors`, which it does
    not count, is not finite."""
    return 0.0 * sum_of_squares(tensors)


def deepspeed_norm(engine: Any, device: torch.device) -> Tensor:
    """DeepSpeed's global gradient norm of the last step, before clipping (ZeRO 1 to 3, where it also clips): scalar on
    `device`, infinite if it skipped the update, because the norm was not finite."""
    norm = math.inf if engine.optimizer.overflow else engine.get_global_grad_norm()
    # With an offloaded optimizer DeepSpeed's is in CPU memory.
    return norm.to(device) if isinstance(norm, Tensor) else torch.full((), norm, dtype=torch.float64, device=device)


def sum_as_we_do(optimizer: Any, *, in_stages: bool = False) -> None:
    """Lets DeepSpeed's optimizer of ZeRO 1 and 2 take the norm by `sum_of_squares`: the same to 1e-7, in one reading of
    the gradients. DeepSpeed 0.19.8 makes an fp64 copy of each gradient, in two launches for each parameter (20 bytes an
    element where 4 are needed), and copies a -1 to the device for each group of parameters, for which the host waits.
    An offloaded optimizer, whose gradients are in CPU memory, asks another function.

    `in_stages`: of a pipeline. DeepSpeed asks the other stages for each group of parameters; stages with other numbers
    of groups would wait for each other for ever. So they are asked once."""
    from deepspeed.runtime.zero import stage_1_and_2  # here: device.start prepares its import

    def squares_of(gradients: Iterable[Tensor], parameters: Iterable[Any]) -> Tensor:
        """Of one group of parameters on this rank."""
        given = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        counted = [
            gradient
            for gradient, parameter in zip(given, parameters, strict=False)
            if not getattr(parameter, "ds_pipe_replicated", False)
            and (stage_1_and_2.is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0)
        ]
        return sum_of_squares(counted).float() if counted else torch.zeros((), device=optimizer.device)

    def over_ranks(squares: Tensor) -> Tensor:
        dist.all_reduce(squares, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=squares, op=dist.ReduceOp.SUM)
        norm = squares.sqrt()
        return norm.masked_fill_(~torch.isfinite(norm), -1.0)

    def norm_of(gradients: Iterable[Tensor], parameters: Iterable[Any], norm_type: int = 2) -> Tensor:
        """Of one group of parameters, over all ranks, each element once: what tensor-parallel ranks or stages of a
        pipeline all hold is the first one's. -1 if it is not finite, by which DeepSpeed knows it."""
        assert norm_type == 2
        return over_ranks(squares_of(gradients, parameters))

    def norm_of_all(norm_type: int = 2) -> Tensor:
        """Of all groups together. Of experts that are divided each data-parallel rank has a part that no other has."""
        assert norm_type == 2
        places = range(len(optimizer.bit16_groups))
        own = [squares_of(optimizer.averaged_gradients[n], optimizer.params_in_partition[n]) for n in places]
        return over_ranks(torch.stack(own).sum())

    assert callable(optimizer.get_grad_norm_direct) and callable(optimizer.scaled_global_norm)
    optimizer.get_grad_norm_direct = norm_of  # RELIES-ON deepspeed-norm
    if in_stages:
        optimizer.scaled_global_norm = norm_of_all


def see_copies(optimizer: Any) -> None:
    """Lets DeepSpeed's optimizer of ZeRO 3 see a gradient that is not finite also of a parameter that all
    tensor-parallel ranks hold, on a rank whose copy the norm does not count: there one that it counts becomes NaN for
    it. The norm keeps its bits. fp16, which is asked about values, needs none of it; offloaded gradients are in CPU
    memory."""
    from deepspeed.runtime.zero import stage3  # here: device.start prepares its import

    if optimizer.model_parallel_rank == 0 or optimizer.offload_optimizer:
        return
    norm_of = optimizer.get_grad_norm_direct

    def norm_with_copies(gradients: Iterable[Tensor], parameters: Iterable[Any], norm_type: int = 2) -> Tensor:
        given, owners = list(gradients), list(parameters)
        counted = [n for n, owner in enumerate(owners) if stage3.is_model_parallel_parameter(owner)]
        copies = [n for n in range(len(owners)) if n not in counted]
        if not copies:
            return norm_of(given, owners, norm_type)
        shown = zero_if_finite([given[n] for n in copies])
        if counted:
            smallest = min(counted, key=lambda n: given[n].numel())
            given[smallest] = given[smallest] + shown
            return norm_of(given, owners, norm_type)
        with replaced(owners[0], "tensor_model_parallel", True):  # nothing else counts here
            return norm_of([shown, *given[1:]], owners, norm_type)

    optimizer.get_grad_norm_direct = norm_with_copies  # RELIES-ON deepspeed-copies


def ask_once(optimizer: Any) -> None:
    """Lets DeepSpeed's optimizer of ZeRO 1 and 2 ask the device once a step whether the gradients are finite, by their
    norm, which is not finite where one of them is not. DeepSpeed 0.19.8 asks before that about the values (some
    launches for each parameter), and before it clips once for each group of parameters. The host waits for the device
    each time. The numbers are the same.

    Where the norm does not tell, the optimizer stays as it is: of experts DeepSpeed averages it over ranks, which hides
    one that is not finite; of what tensor-parallel ranks or stages all hold, it counts one rank's. So does an offloaded
    one, whose gradients are in CPU memory."""
    from deepspeed.runtime.zero import stage_1_and_2  # here: device.start prepares its import

    if optimizer.has_moe_layers or optimizer.mpu is not None or optimizer.cpu_offload:
        return
    clip = optimizer.unscale_and_clip_grads

    def clip_without_a_question(*args: Any, **options: Any) -> None:
        with replaced(stage_1_and_2, "is_invalid_grad_norm", lambda norm: False):  # the step is not skipped
            clip(*args, **options)

    # RELIES-ON deepspeed-ask-once
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.unscale_and_clip_grads = clip_without_a_question


class GradientNorm:
    """The global gradient norm before clipping, at every ZeRO stage, and whether it let the update happen.

    If the norm is not finite, it is so on every rank, and no rank updates: weights, Adam's moments and its step
    counters stay as they were. DeepSpeed's ZeRO optimizers do that themselves, for which the host waits for the norm.
    For ZeRO 0 our fused AdamW decides on the device.

    DeepSpeed gives the norm for ZeRO 1 to 3, at 3 summed in fp64. For ZeRO 0 norm and clipping are ours, between the
    last backward pass (which averages over ranks) and the optimizer step (which clears the gradients), see
    `sum_of_squares`.
    """

    def __init__(self, engine: Any, clip_norm: float, parallel: ParallelContext) -> None:
        self._engine = engine
        self._parallel = parallel
        self._clip_norm = clip_norm
        self._own: Tensor | None = None

    def before_step(self) -> None:
        """Call before engine.step() of the last micro-step: takes the norm and clips where DeepSpeed does not."""
        if self._engine.zero_optimization_stage() != 0:
            return
        parameters = list(self._engine.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        counted = [
            p.grad
            for p in parameters
            if p.grad is not None and (p.tensor_model_parallel or self._parallel.tensor_rank == 0)
        ]
        squares = sum_of_squares(counted)
        if len(counted) < len(gradients):
            copies = [p.grad for p in parameters if p.grad is not None and not p.tensor_model_parallel]
            squares = squares + zero_if_finite(copies)
        if self._parallel.tensor_group is not None:
            dist.all_reduce(squares, group=self._parallel.tensor_group)
        self._own = squares.sqrt()
        # A fused optimizer looks at this flag on the device and then changes nothing: the host need not know.
        # RELIES-ON torch-found-inf
        self._engine.optimizer.found_inf = (~torch.isfinite(self._own)).float()
        if self._clip_norm > 0.0:
            factor = (self._clip_norm / (self._own + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.float())

    def value(self, device: torch.device) -> Tensor:
        """The norm, a scalar on `device`; not finite if the update was skipped. Call after engine.step() of the last
        micro-step."""
        return deepspeed_norm(self._engine, device) if self._own is None else self._own
