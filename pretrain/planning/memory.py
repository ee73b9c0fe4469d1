"""How much memory a rank needs at its highest point: an estimate, without a device.

Weights, master weights and moments are counted from what the layers declare (pretrain/parallel/layout.py), activations
are traced (traced.py), and what DeepSpeed holds of gradients is read from its code (gradients.py). Tests compare all
with a rehearsed step and with an allocator's counts. Not counted: the CUDA context, NCCL, what the allocator cannot
use, what a kernel needs for itself. What is not known is not estimated: `why_unknown` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config.graph_rules import takes_graphs
from pretrain.config.rules import choose_backends
from pretrain.config.schema import Config
from pretrain.parallel.layout import rank_bytes
from pretrain.planning.gradients import Gradients, gradients
from pretrain.planning.traced import Activations, TracedRun, traced

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USABLE = 0.9
"""Share of a device's memory that an estimate may fill; the rest is for what is not counted."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank."""

    weights: int
    """What the rank computes with."""
    optimizer: int
    """fp32 master weights and Adam's moments."""
    memory: int
    """Transformer-XL memory of all its streams, as it is read and as it is written."""
    gradients: Gradients
    activations: Activations
    graphs: int = 0
    """What CUDA graphs hold besides the activations: gradients of each kind of micro-step. 0: there are none."""

    @property
    def resting(self) -> int:
        """Between steps."""
        return self.weights + self.optimizer + self.memory

    @property
    def total(self) -> int:
        """At the highest point of a step: in its last micro-step, or after that. CUDA graphs give nothing back:
        activations are there during the update too."""
        gradients, activations = self.gradients, self.activations
        if self.graphs:
            highest = max(gradients.coming + gradients.stay + gradients.joined, gradients.afterwards)
            return self.resting + self.graphs + activations.peak + highest
        if gradients.stay:
            coming = max(activations.with_gradients, gradients.stay + activations.at_the_end) + gradients.coming
        else:
            reducing = max(activations.later, activations.at_a_gradient + gradients.joined)
            reducing -= gradients.passed * activations.of_a_layer
            coming = max(gradients.first + activations.later, gradients.coming + reducing)
        return self.resting + max(gradients.at_loss + activations.at_loss, coming, gradients.afterwards)


def why_unknown(config: Config) -> str | None:
    """What rules an estimate out; None if there is one."""
    parallel = config.parallel
    for key in ("tensor", "pipeline", "expert"):
        if getattr(parallel, key) > 1:
            return f"parallel.{key} = {getattr(parallel, key)}: activations of divided models are not traced"
    if parallel.zero == 3:
        return "parallel.zero = 3: how many parameters DeepSpeed holds at once depends on its own prefetching"
    if parallel.offload_optimizer:
        return "parallel.offload_optimizer: DeepSpeed moves gradients to the CPU while the backward pass goes on"
    return None


def estimate(config: Config, data_size: int, device_type: str, *, micro_sequences: int | None = None) -> MemoryEstimate:
    """Of a rank of a run whose `why_unknown` is None, on `cuda` or `cpu`. `micro_sequences`: instead of the run's."""
    micro = micro_sequences or config.batch.micro_sequences
    (held,), model = rank_bytes(config, data_size), config.model
    count, dtype = held.parameters, DTYPES[config.train.precision]
    streams = config.batch.global_sequences // data_size
    micro_steps = config.batch.global_sequences // (micro * data_size)
    run = TracedRun(
        model,
        micro,
        config.train.recompute,
        choose_backends(config, device_type),
        dtype,
        config.data.document_mask,
    )
    return MemoryEstimate(
        weights=held.weights,
        optimizer=held.optimizer,
        memory=2 * streams * model.num_layers * model.memory_length * model.d_model * dtype.itemsize,
        gradients=gradients(config, data_size, micro_steps, device_type),
        activations=traced(run),
        graphs=_graphs(config, count, dtype.itemsize, data_size, device_type),
    )


def _graphs(config: Config, count: int, itemsize: int, data_size: int, device_type: str) -> int:
    """Bytes of the gradients that CUDA graphs keep: one copy for each length of the Transformer-XL memory."""
    if not takes_graphs(config, data_size=data_size, device_type=device_type):
        return 0
    kinds = 1 + config.model.memory_length // config.model.sequence_length
    return kinds * count * itemsize


@dataclass(frozen=True)
class Fit:
    """Which micro-batches fit a device."""

    capacity: int
    """Bytes of the device."""
    largest: int | None
    """The largest batch.micro_sequences whose estimate fills at most USABLE of it; None: not even one sequence does."""
    needed: int
    """Bytes of it, or of one sequence."""
    next_larger: int | None
    """The smallest that does not fit; None: the largest possible one fits."""
    needed_next: int | None


def largest_micro_batch(config: Config, data_size: int, device_type: str, capacity: int, *, beside: int = 0) -> Fit:
    """Among the micro-batches that divide the rank's share of a step. An estimate rises with the micro-batch, so a
    bisection finds it: a few traces. The largest possible one is asked first: of a single micro-step no sums are kept,
    so that it may need less than the one before. `beside`: bytes that are there besides, whatever the micro-batch."""
    share = config.batch.global_sequences // data_size
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def needed(index: int) -> int:
        return estimate(config, data_size, device_type, micro_sequences=sizes[index]).total + beside

    last = len(sizes) - 1
    fits, does_not = (last, last + 1) if needed(last) <= USABLE * capacity else (-1, last)
    while does_not - fits > 1:
        middle = (fits + does_not) // 2
        if needed(middle) <= USABLE * capacity:
            fits = middle
        else:
            does_not = middle
    is_last = does_not == len(sizes)
    return Fit(
        capacity,
        sizes[fits] if fits >= 0 else None,
        needed(max(fits, 0)),
        None if is_last else sizes[does_not],
        None if is_last else needed(does_not),
    )
