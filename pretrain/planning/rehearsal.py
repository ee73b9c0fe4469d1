"""A step of one rank of a run of any size, rehearsed: the code that trains (model, DeepSpeed's engine, executor, sums
over ranks) runs on tensors that have shapes and no data, in a process group that sends nothing. So what a rank holds
and sends is known from that code and from no formula of its own.

Two steps are taken, and the second is what counts: the first makes the optimizer's state, fills Transformer-XL memory
and lets ZeRO 3 learn in which order parameters are used.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.memory import layer_memories
from pretrain.config.rules import check_ranks, choose_backends
from pretrain.config.schema import Config
from pretrain.data.windows import Batch
from pretrain.engine.build import build_engine, build_executor, build_module
from pretrain.engine.deepspeed_json import deepspeed_json
from pretrain.engine.moving_average import MovingAverage
from pretrain.engine.step_sums import StepReducer
from pretrain.parallel.context import parallel_context
from pretrain.phases import Phases
from pretrain.planning.fake_world import fake_world
from pretrain.planning.ledger import CPU, Ledger
from pretrain.planning.record import GRADIENTS, RESTING, Rehearsal, Routed


def rehearse(
    config: Config,
    num_ranks: int,
    rank: int,
    device_type: str,
    *,
    most_micro_steps: int | None = None,
    routed: Routed = "even",
) -> Rehearsal:
    """Rank `rank` of `num_ranks` of this run, on `cuda` or `cpu`. `most_micro_steps`: so many are rehearsed if the run
    has as many; by default enough for the highest point. The process must have no process group."""
    data_size = check_ranks(config, num_ranks)
    batch, stages = config.batch, config.parallel.pipeline
    micro_steps = min(config.micro_steps(data_size), most_micro_steps or (2 if stages == 1 else stages + 1))
    sequences = micro_steps * batch.micro_sequences * data_size
    shorter = config.replaced("batch", global_sequences=sequences)
    by_gloo = device_type == "cpu"
    with fake_world(config, rank, num_ranks, routed), Ledger(by_gloo=by_gloo) as ledger:
        rehearsed = _Rank(shorter, device_type, ledger, streams=batch.global_sequences)
        for _ in range(2 if config.parallel.zero == 3 else 1):  # ZeRO 3 knows the order of its gathers after two
            rehearsed.step()
            rehearsed.settle()
        ledger.calls.clear()
        ledger.forget_peak()
        resting = {part: size for part, size in ledger.parts.items() if size}
        kept, starts = rehearsed.step()
        return Rehearsal(
            micro_steps=micro_steps,
            resting={part: size for part, size in resting.items() if part not in ledger.elsewhere},
            elsewhere=sum(size for part, size in resting.items() if part in ledger.elsewhere),
            kept=kept,
            peak=ledger.peak,
            at_peak={part: size for part, size in ledger.at_peak.items() if size and part not in ledger.elsewhere},
            calls=list(ledger.calls),
            starts=starts,
        )


class _Rank:
    """Model, engine and executor of the rank that this process plays."""

    def __init__(
        self, config: Config, device_type: str, ledger: Ledger, *, streams: int, device: torch.device = CPU
    ) -> None:
        """`streams`: sequences of a whole step. `device`: where the tensors, which have no data, say that they are."""
        self._config, self._ledger, self._device = config, ledger, device
        self._parallel = parallel_context(config)
        self._is_offloaded = config.parallel.offload_optimizer and device_type == "cuda"
        with device:  # a run moves it there, which parameters without data refuse
            model = build_module(config, self._parallel, choose_backends(config, device_type))
        settings = deepspeed_json(config, self._parallel.data_size)["zero_optimization"]
        ledger.bucket = int(settings.get("reduce_bucket_size", 0))
        self._engine: Any = build_engine(model, config, self._parallel, device)
        _join_at_once(self._engine.optimizer)
        first = self._parallel.data_rank
        own = torch.arange(first, streams, self._parallel.data_size, device=device)
        for _, memory in layer_memories(self._engine.module):
            memory.assign(own, streams)
        self._executor = build_executor(self._engine, config, self._parallel)
        self._average = MovingAverage(self._engine, config.train.ema_decay) if config.train.ema_decay else None
        self._reduce = StepReducer(self._engine.module, self._parallel, device)
        self._watch = _Watch(ledger, self._engine.module)
        self.settle()

    def step(self) -> tuple[dict[str, int], list[int]]:
        """-> `kept` and `starts` of a Rehearsal."""
        batches, watch = self._batches(), self._watch
        watch.begin()
        output = self._executor.train(batches, watch.phases)
        if self._average is not None:
            self._average.update(output.grad_norm)
        self._ledger.when = self._ledger.part = "update"
        self._reduce(output, len(batches))
        for _, memory in layer_memories(self._engine.module):
            memory.advance()
        watch.end()
        return watch.kept, watch.starts

    def _batches(self) -> list[Batch]:
        batch, length = self._config.batch, self._config.model.sequence_length
        made = []
        for number in range(self._config.micro_steps(self._parallel.data_size)):
            sizes = (2, batch.micro_sequences, length)
            tokens, targets = torch.zeros(sizes, dtype=torch.int64, device=self._device).unbind()
            first = number * batch.micro_sequences * self._parallel.data_size + self._parallel.data_rank
            index = first + self._parallel.data_size * torch.arange(batch.micro_sequences, device=self._device)
            documents = torch.zeros_like(tokens) if self._config.data.document_mask else None
            made.append(Batch(tokens, targets, index, documents))
        return made

    def settle(self) -> None:
        """Names what is there between steps."""
        ledger, engine = self._ledger, self._engine
        gc.collect()  # cycles of objects would keep what is no longer used
        ledger.rename(lambda part: part not in RESTING, "engine")
        for part, tensors in _held(engine).items():
            ledger.hold(part, tensors)
        if self._is_offloaded:
            # Where the optimizer updates, gradients wait too.
            ledger.elsewhere = {"optimizer", "update"}
            ledger.now = sum(size for part, size in ledger.parts.items() if part not in ledger.elsewhere)


def _join_at_once(optimizer: Any) -> None:
    """ZeRO 1 and 2 cut each bucket of gradients at the border of every rank's share: of 1,024 ranks hundreds of pieces,
    which are joined, summed over ranks and taken apart again by an operator or two each. Here one operator joins them,
    into as much memory, and taking apart, which takes none, is left out: most of a rehearsal's time."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    join = optimizer.flatten

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1:  # not copied
            return join(tensors)
        return tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))

    optimizer.flatten = flatten  # RELIES-ON deepspeed-pieces
    optimizer.unflatten = lambda joined, tensors: tensors


def _held(engine: Any) -> dict[str, Iterator[Tensor | None]]:
    """What DeepSpeed (0.19.8) and the layers hold between steps, by part; the last part that a storage is in counts."""
    optimizer = engine.optimizer  # RELIES-ON deepspeed-held
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    offload = list(getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    offload += [getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None)]
    sums = list(getattr(optimizer, "fp32_groups_gradients_flat", []))
    sums += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    parameters = list(engine.module.parameters())
    weights = [*parameters, *(getattr(p, "ds_tensor", None) for p in parameters)]
    memories = [m for _, memory in layer_memories(engine.module) for m in (memory.kept, memory._written)]
    is_offloaded = engine.zero_cpu_offload() if hasattr(engine, "zero_cpu_offload") else False
    return {
        "optimizer": iter([*masters, *states, *offload, *(p.grad for p in masters if is_offloaded)]),
        GRADIENTS: iter(sums),
        "weights": iter(weights),
        "memory": iter(memories),
        "pipeline": iter(getattr(engine, "_grad_layer_buf", [])),
    }


class _Watch:
    """Tells the ledger what is computed: phases of the executor, and layers."""

    def __init__(self, ledger: Ledger, module: nn.Module) -> None:
        self._ledger = ledger
        self.phases = Phases()
        self.phases.on_enter = self._phase
        self.kept: dict[str, int] = {}
        self.starts: list[int] = []
        self._layers = {name: layer for name, layer in module.named_modules() if _is_layer(name)}
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._name(name))
            layer.register_forward_hook(lambda *_, name=name: self._leave(name))

    def begin(self) -> None:
        self.kept, self.starts = {}, []
        self._ledger.part, self._ledger.when = "inputs", "micro-step"

    def end(self) -> None:
        self._ledger.part = "engine"
        self.starts.append(len(self._ledger.calls))

    def _phase(self, name: str) -> None:
        ledger = self._ledger
        if name.startswith("forward"):
            self.starts.append(len(ledger.calls))
        elif name == "backward":
            ledger.part = "engine"  # outside the pass itself, DeepSpeed makes buffers for gradients
        else:
            ledger.part = ledger.when = "update"

    def _name(self, name: str) -> None:
        self._ledger.part = name

    def _leave(self, name: str) -> None:
        self._ledger.part = "engine"
        if name == list(self._layers)[-1] and not self.kept:
            self.kept = {layer: self._ledger.parts[layer] for layer in self._layers}


def _is_layer(name: str) -> bool:
    return name in ("embedding", "final_norm", "head") or (name.startswith("blocks.") and name.count(".") == 1)
