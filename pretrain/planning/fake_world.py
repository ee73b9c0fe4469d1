"""One process that plays any rank of a run, without the others and without memory: a process group whose collectives do
nothing, tensors that have shapes and no data, and the code that trains in between.

What that code reads from a tensor, or does outside of operators, has an answer here:

    kernels that are called between two operators (the `late` halves of a backward pass) give empty gradients
    tokens that go to the experts of other ranks are as many as `Routed` says
    the stages of a pipeline tell each other the sizes of their reports: all blocks are alike
    parameters change their dtype in place (torch swaps objects, and refuses where something refers to them)
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import model.feedforward.sigma_moe as sigma_moe_layer
from common.replaced import items_replaced, replaced
from model.kernels.ops import expert_linear, sigma_moe, switchhead
from model.parallel.exchange import Exchange
from pretrain.config.schema import Config
from pretrain.engine import step_sums
from pretrain.parallel.stages import stage_bounds
from pretrain.planning.record import Routed


@contextlib.contextmanager
def fake_world(config: Config, rank: int, num_ranks: int, routed: Routed) -> Iterator[None]:
    """Inside, this process is rank `rank` of `num_ranks` and makes fake tensors. It must have no process group; it has
    none afterwards, and all is as it was."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a process with a process group cannot play a rank of another run"
    own = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": num_ranks, "LOCAL_SIZE": 1}
    with contextlib.ExitStack() as stack:
        stack.enter_context(items_replaced(os.environ, {key: str(value) for key, value in own.items()}))
        if "__compatible_ops__" not in vars(deepspeed.ops):  # a look at DeepSpeed's own would make it: see device.start
            deepspeed.ops.__compatible_ops__ = {}  # RELIES-ON deepspeed-operators
            stack.callback(vars(deepspeed.ops).pop, "__compatible_ops__")
        stack.enter_context(items_replaced(deepspeed.ops.__compatible_ops__, {"deepspeed_shm_comm": False}))
        dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
        stack.callback(_forget_the_world)
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
        for patch in _patches(config, routed):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _forget_the_world() -> None:  # RELIES-ON deepspeed-world
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    dist.destroy_process_group()
    comm.cdb = None
    groups.mpu = None
    for name, value in vars(groups).items():
        if name.startswith("_") and isinstance(value, dict) and name.isupper():
            value.clear()
        elif name.startswith("_") and isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


def _patches(config: Config, routed: Routed) -> list[Any]:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero import partitioned_param_coordinator

    rows = _Rows(routed)
    return [
        replaced(nn.Module, "_apply", _apply),  # RELIES-ON torch-fake
        replaced(FakeTensor, "data_ptr", _no_address),
        # DeepSpeed asks this machine's device, where no GPU needs to be; check_device has refused fp16 on CPUs.
        replaced(get_accelerator(), "is_fp16_supported", _yes),
        # RELIES-ON deepspeed-alone
        replaced(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", _nothing),
        replaced(PipelineEngine, "_recv_tensor_meta", _receive_shapes(config)),
        replaced(dist, "all_gather_object", _AllParts(config)),
        *(replaced(module, "implementation", _late) for module in (expert_linear, sigma_moe, switchhead)),
        replaced(sigma_moe_layer, "own_slots", _own_slots),
        replaced(sigma_moe_layer.SigmaMoE, "_exchange", rows.exchange(sigma_moe_layer.SigmaMoE._exchange)),
        replaced(Exchange, "plan", rows.plan),
    ]


def _nothing(*_: Any, **__: Any) -> None:
    """What no other rank hears."""


def _yes() -> bool:
    return True


def _no_address(tensor: Tensor) -> int:
    return 0


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters(recurse):
            parameter.data = function(parameter.data)
    return module


# ------------------------------------------------------------------------------------------- kernels between operators


def _late(op: str, backend: str) -> Any:
    return _LATE[op]


def _empty(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


_LATE = {
    "sigma_moe": SimpleNamespace(
        input_gradients=lambda grad, inputs, hidden: _empty(inputs.x, inputs.scores, hidden),
        expert_gradients=lambda grad, inputs, hidden, kept: _empty(inputs.up_experts, inputs.down_experts),
    ),
    "switchhead_value": SimpleNamespace(
        input_gradients=lambda grad, inputs, saved: _empty(inputs[0], inputs[1].scores, inputs[1].scores),
        expert_gradient=lambda grad, inputs, saved, kept: _empty(inputs[2])[0],
    ),
    "expert_linear": SimpleNamespace(
        input_gradient=lambda grad, x, order, load, experts: _empty(x)[0],
        expert_gradient=lambda grad, x, order, load, experts: _empty(experts)[0],
    ),
}

# -------------------------------------------------------------------------------------------- where tokens are computed


def _own_slots(order: Tensor, load: Tensor, held: slice) -> tuple[Tensor, Tensor]:
    """As model.feedforward.sigma_moe.own_slots, where every expert is chosen equally often."""
    return order[: order.shape[0] * (held.stop - held.start) // load.shape[0]], load[held]


class _Rows:
    """As many rows as expert-parallel ranks send each other."""

    def __init__(self, routed: Routed) -> None:
        self._routed, self._sent, self._choices = routed, 0, 0

    def exchange(self, original: Any) -> Any:
        def exchange(layer: Any, tokens: Tensor, routing: Any) -> Tensor:
            self._sent, self._choices = routing.order.shape[0], routing.scores.shape[-1]
            return original(layer, tokens, routing)

        return exchange

    def plan(self, load: Tensor, group: dist.ProcessGroup) -> Exchange:
        received_load = torch.empty_like(load)
        dist.all_to_all_single(received_load, load.contiguous(), group=group)
        ranks = group.size()
        sent = received = [self._sent // ranks + (other < self._sent % ranks) for other in range(ranks)]
        if self._routed == "worst":
            # A token's choices differ, so no more of them are here than this rank has experts.
            here = self._sent // self._choices * min(self._choices, load.shape[0] // ranks)
            others = self._sent - here
            received = [here] * ranks
            sent = [others // (ranks - 1)] * ranks
            sent[(group.rank() + 1) % ranks] += others % (ranks - 1)
            sent[group.rank()] = here
        return Exchange(group, sent, received, received_load.view(ranks, -1))


# ------------------------------------------------------------------------------- what stages of a pipeline are told


def _receive_shapes(config: Config) -> Any:
    """PipelineEngine's question to the stage before, in the first step: which tensors come."""
    shards = config.parallel.tensor if config.parallel.sequence else 1
    sequences, tokens = config.batch.micro_sequences, config.model.sequence_length // shards

    def receive(engine: Any, stage: int) -> tuple[Tensor, Tensor]:
        hidden = engine._allocate_or_extend_buffers(0, [sequences, tokens, config.model.d_model], _dtype(engine))
        return hidden, engine._allocate_or_extend_buffers(1, [sequences], torch.int64)

    return receive


def _dtype(engine: Any) -> torch.dtype:
    return next(engine.module.parameters()).dtype


class _AllParts:
    """`dist.all_gather_object` for StepReducer: the report of every stage from this rank's own."""

    def __init__(self, config: Config) -> None:
        bounds, last = stage_bounds(config), config.model.num_layers
        self._blocks = [min(end, last + 1) - max(start, 1) for start, end in itertools.pairwise(bounds)]

    def __call__(self, parts: list[Any], own: Any, group: dist.ProcessGroup) -> None:
        assert isinstance(own, step_sums._Part)
        held = self._blocks[group.rank()]
        for stage, blocks in enumerate(self._blocks):
            rows = own.rows[::held] * blocks  # rows of one kind follow each other, as many for each block
            parts[stage] = step_sums._Part([name for name, _ in rows], rows, own.num_tracking // held * blocks)
        parts[group.rank()] = own
