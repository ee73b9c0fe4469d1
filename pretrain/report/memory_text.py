"""The memory that a run will need, in words: rows beside the derived values of a dry run."""

from __future__ import annotations

from common.errors import UserError
from common.units import GIB
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.planning.devices import device_of_card
from pretrain.planning.gradients import fullest_rank
from pretrain.planning.layout_plan import copy_beside_a_step, rehearsed, step_time
from pretrain.planning.machine import MachineOptions, machine
from pretrain.planning.measured import measurements
from pretrain.planning.memory import USABLE, Fit, MemoryEstimate, estimate, largest_micro_batch, why_unknown
from pretrain.planning.paces import why_no_time
from pretrain.report.estimate import RunEstimate
from pretrain.report.startup import DerivedValue

NOT_COUNTED = "not counted: CUDA context, NCCL, fragments, kernels' own"


def memory_rows(config: Config, data_size: int, device_type: str, capacity: int) -> list[DerivedValue]:
    """The estimate for the run as it is, and the largest micro-batch that fits `capacity` bytes."""
    unknown = why_unknown(config)
    if unknown is not None:
        return [DerivedValue("memory of a rank", "not estimated", unknown)]
    copy = copy_beside_a_step(config, data_size, 0, device_type)  # of a model in one piece: a rank has one stage
    row = _estimate_row(estimate(config, data_size, device_type))
    fit = largest_micro_batch(config, data_size, device_type, capacity, beside=copy)
    return [
        DerivedValue(row.name, row.value, f"{row.formula}{copy_text(copy)}"),
        _fit_row(fit, " with that copy" if copy else ""),
    ]


def run_estimate(
    config: Config, num_ranks: int, device_type: str, *, card: str | None, ranks_per_node: int
) -> RunEstimate:
    """What is expected of a run, of the rank that needs most. `card`: the name that its driver gives to a GPU; a step's
    time is estimated if it is in the table of devices."""
    seconds = _step_seconds(config, num_ranks, card, ranks_per_node) if card is not None else None
    if why_unknown(config) is not None:
        return _rehearsed_estimate(config, num_ranks, device_type, seconds)
    found = estimate(config, check_ranks(config, num_ranks), device_type)
    row = _estimate_row(found)
    copy = copy_beside_a_step(config, num_ranks, 0, device_type)
    return RunEstimate(found.total + copy, device_type, f"{row.value} {row.formula}{copy_text(copy)}", seconds)


def _rehearsed_estimate(
    config: Config, num_ranks: int, device_type: str, seconds: tuple[float, float] | None
) -> RunEstimate:
    """Of a layout whose activations are not traced: of the rank that needs most."""
    data_size = check_ranks(config, num_ranks)
    needs = []
    for stage in range(config.parallel.pipeline):
        rank = fullest_rank(config, data_size, stage)
        peak = rehearsed(config, num_ranks, rank, device_type).peak
        copy = copy_beside_a_step(config, num_ranks, stage, device_type)
        needs.append((peak + copy, rank, peak, copy))
    total, rank, peak, copy = max(needs)
    what = f"of rank {rank:,}, at the highest point of a rehearsed step"
    text = f"{peak / GIB:.2f} GiB estimated: {what}; {NOT_COUNTED}{copy_text(copy)}"
    return RunEstimate(total, device_type, text, seconds)


def copy_text(size: int) -> str:
    """What `copy_beside_a_step` gives, beside the memory of a step."""
    if not size:
        return ""
    return f"; {size / GIB:.2f} GiB more for the copy that a checkpoint is written from (checkpoint.asynchronous)"


def _step_seconds(config: Config, num_ranks: int, card: str, ranks_per_node: int) -> tuple[float, float] | None:
    """From and to, by arithmetic alone; None where something of the machine is not known."""
    device = device_of_card(card)
    if device is None:
        return None
    try:
        found = machine(MachineOptions(gpu=device.name, gpus=num_ranks, gpus_per_node=ranks_per_node))
    except UserError:  # of options that a run does not have, such as the link between nodes
        return None
    if why_no_time(config, found) is not None:
        return None
    time = step_time(config, found, measurements(device))
    return time.fast.total, time.slow.total


def _estimate_row(found: MemoryEstimate) -> DerivedValue:
    parts = {
        "weights": found.weights,
        "optimizer": found.optimizer,
        "gradients": max(found.gradients.between, found.gradients.stay),
        "their buffers": found.gradients.buckets,
        "memory": found.memory,
        "CUDA graphs": found.graphs,
        "activations": found.activations.peak,
        "reduction and update": found.gradients.afterwards,
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    layer = f"{found.activations.of_a_layer / GIB:.3f} a block"
    return DerivedValue(
        "memory of a rank",
        f"{found.total / GIB:.2f} GiB",
        f"estimated: {listed} ({layer}), which are not all there at once; {NOT_COUNTED}",
    )


def _fit_row(found: Fit, of_what: str) -> DerivedValue:
    capacity = f"{USABLE:.0%} of {found.capacity / GIB:.1f} GiB"
    if found.largest is None:
        needed = f"one sequence needs {found.needed / GIB:.2f} GiB{of_what}"
        return DerivedValue(
            "largest micro-batch", "none", f"{needed}, more than {capacity}: divide the model or recompute"
        )
    more = ""
    if found.next_larger is not None and found.needed_next is not None:
        more = f"; {found.next_larger} would need {found.needed_next / GIB:.2f}"
    return DerivedValue(
        "largest micro-batch",
        f"{found.largest}",
        f"batch.micro_sequences that fits {capacity}: {found.needed / GIB:.2f} GiB{of_what}{more}",
    )
