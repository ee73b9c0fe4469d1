"""The fp32 training state that this rank owns, as named pieces of full parameters, for every ZeRO stage.

This is the only module that knows how DeepSpeed 0.19.8 lays out its partitions:
    stage 0          every rank holds every parameter; for saving, each takes one slice of it
    stages 1, 2      one flat fp32 tensor per parameter group and rank; param._hp_mapping says where a piece lies
    stage 3          each parameter is cut into equal pieces (the last one padded) inside flat fp32 tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
"""A moving average of the weights lies beside the moments, in AdamW's state, under a key that AdamW does not know."""


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + master.numel() of the flattened parameter `name`: views into the optimizer's memory."""

    name: str
    start: int
    master: Tensor
    """[n] fp32 weights."""
    moments: dict[str, Tensor]
    """exp_avg and exp_avg_sq, [n] fp32 each."""
    average: Tensor | None = None
    """[n] fp32 moving average of the weights, if the run keeps one."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them by kind, as checkpoints name them."""
        average = {} if self.average is None else {AVERAGE: self.average}
        return {"master": self.master, **self.moments, **average}


def pieces(engine: Any, *, rank: int, world_size: int, for_saving: bool) -> Iterator[Piece]:
    """This rank's pieces. `for_saving`: no element comes from two ranks; else: all that this rank must restore."""
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            located = _stage_3(engine.optimizer, parameter)
        elif stage in (1, 2):
            located = _stages_1_and_2(engine.optimizer, parameter)
        else:
            located = _stage_0(parameter, rank, world_size, for_saving)
        if located is None:
            continue
        start, length, flat, offset = located
        state = _adam_state(_torch_optimizer(engine), flat)
        part = slice(offset, offset + length)
        yield Piece(
            name=name,
            start=start,
            master=flat.detach().view(-1)[part],
            moments={key: state[key].view(-1)[part] for key in MOMENTS},
            average=state[AVERAGE].view(-1)[part] if AVERAGE in state else None,
        )


def keep_average(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Puts a copy of all master weights of this rank beside Adam's moments: (copy, master) of each flat tensor, fp32,
    padding included."""
    optimizer = _torch_optimizer(engine)
    if engine.zero_optimization_stage() == 3:  # its param_groups are empty between steps
        flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    else:
        flats = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pairs = []
    for flat in flats:
        average = _adam_state(optimizer, flat)[AVERAGE] = flat.detach().clone()
        pairs.append((average, flat.detach()))
    return pairs


def refresh_weights(engine: Any) -> None:
    """Gives the model the values that the master weights have now, as an optimizer step does. Collective."""
    # RELIES-ON deepspeed-weights
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    with torch.no_grad():
        if stage in (1, 2):
            optimizer.update_lp_params()
        elif stage == 3:
            optimizer.checkpoint_event_prologue()  # whole parameters become parts again
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()  # those that stay whole are gathered


def optimizer_steps(engine: Any) -> int:
    """Updates that Adam has applied (the exponent of its bias correction); see `step_counter`."""
    return int(step_counter(engine))


def step_counter(engine: Any) -> Tensor:
    """Adam's own counter of its updates, a scalar; after the first one, or once `pieces` was walked."""
    counter: Tensor = next(s["step"] for s in _torch_optimizer(engine).state.values() if "step" in s)
    return counter


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Sets the counter of every optimizer state (they exist once `pieces` was walked)."""
    optimizer = _torch_optimizer(engine)
    for parameter, state in optimizer.state.items():
        state["step"] = _counter(optimizer, parameter, steps)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The client AdamW, inside DeepSpeed's wrapper if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """State of one (flat) parameter; created as AdamW itself would at its first step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = _counter(optimizer, parameter, 0)
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter.detach())
    return state


def _counter(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> Tensor:
    """A step counter where AdamW keeps it: the fused one beside its parameter, the other one in CPU memory."""
    on_device = bool(optimizer.defaults["fused"])
    return torch.tensor(float(steps), dtype=torch.float32, device=parameter.device if on_device else "cpu")


Located = tuple[int, int, Tensor, int]  # start in the parameter, length, flat tensor, offset in it


def _stage_0(parameter: Tensor, rank: int, world_size: int, for_saving: bool) -> Located | None:
    numel = parameter.numel()
    share = -(-numel // world_size) if for_saving else numel
    start = min(rank * share, numel) if for_saving else 0
    length = min(share, numel - start)
    return (start, length, parameter, start) if length > 0 else None


def _stages_1_and_2(optimizer: Any, parameter: Any) -> Located | None:
    mapping = parameter._hp_mapping  # RELIES-ON deepspeed-partitions
    if mapping is None:  # no element of this parameter lies in this rank's partition
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    local, full = mapping.hp_fragment_address, mapping.lp_fragment_address
    return full.start, full.numel, flat, local.start


def _stage_3(optimizer: Any, parameter: Any) -> Located | None:
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
    length = min(int(share), parameter.ds_numel - start)
    return (start, length, optimizer.fp32_partitioned_groups_flat[group], int(offset)) if length > 0 else None
