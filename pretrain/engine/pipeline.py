"""Pipeline parallelism: DeepSpeed's PipelineModule and its 1F1B schedule around the layers of the plain model.

The hidden state and the sequences' indices travel between stages. An auxiliary loss stays on the stage that computes
it: its gradient is attached to the hidden state that leaves the stage, and its value is summed over stages with the
step's other sums. (As a second output it would cost a second backward pass through the whole stage: DeepSpeed 0.19.8
runs one backward per output.)
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from model.kernels.choice import Backends
from model.language_model import routing_statistics
from model.layers import Head, LayerFactory, State, layer_factories
from model.parallel.context import ParallelContext
from model.parameters import check_declarations
from model.routing import add_up
from pretrain.config.schema import Config
from pretrain.data.windows import Batch
from pretrain.engine.gradient_norm import deepspeed_norm, poisoned_unless_finite
from pretrain.engine.micro_steps import Queries, StepOutput
from pretrain.parallel.groups import asked_for_once, groups_of, tied_group
from pretrain.parallel.stages import stage_bounds
from pretrain.phases import Phases


class _Layer(LayerSpec):
    """A layer that only the stage which holds it builds."""

    def __init__(self, build: LayerFactory) -> None:
        self._factory = build

    def build(self, log: bool = False) -> nn.Module:
        return self._factory()


class PipelineStage(PipelineModule):  # RELIES-ON deepspeed-stages
    """The layers of this rank's pipeline stage, under their canonical names."""

    def __init__(self, config: Config, parallel: ParallelContext, backends: Backends) -> None:
        factories = layer_factories(
            config.model, parallel, backends, seed=config.train.seed, recompute=config.train.recompute
        )
        self._layer_names = [name for name, _ in factories]
        self._bounds = stage_bounds(config)
        topology = PipeModelDataParallelTopology(
            num_pp=parallel.pipeline_size, num_mp=parallel.tensor_size, num_dp=parallel.data_size
        )
        # It prints its partition; ours is among the derived values.
        with contextlib.redirect_stdout(io.StringIO()), asked_for_once():
            super().__init__([_Layer(build) for _, build in factories], topology=topology)
        groups = groups_of(parallel)
        for ours, theirs in (
            (groups.pipeline, self._grid.pp_group),
            (groups.data, self._grid.dp_group),
            (groups.tensor, self._grid.slice_group),
        ):
            assert dist.get_process_group_ranks(ours) == sorted(theirs), "DeepSpeed's groups differ from ours"
        self.config = config.model
        self.parallel = parallel
        self.gradient_scale: Callable[[], float] = lambda: 1.0
        """Factor between the gradient of an auxiliary loss and what the last stage's objective is scaled with: the
        loss scale divided by the number of micro-steps. Set with the engine."""
        self.targets: Iterator[Tensor] = iter(())
        """On the last stage: [B, T] int64 of the micro-steps to come."""
        self.sequence_losses: list[Tensor] = []
        """On the last stage, per micro-step: detached mean cross-entropy of each sequence [B] fp32."""
        self.auxiliary_losses: list[Tensor] = []
        """Per micro-step: detached sum of this stage's auxiliary losses, fp32 scalar."""
        self._tied: list[tuple[Tensor, Any]] = []
        if config.model.tied_embedding:
            group = tied_group(parallel)
            if parallel.pipeline_rank == 0:
                self._tied = [(self.embedding.weight, group)]
            elif parallel.is_last_stage:
                self._tied = [(self.head.weight, group)]
                self.head.weight.ds_pipe_replicated = True  # the gradient norm counts the first stage's copy
        held = self._layer_names[self._bounds[parallel.pipeline_rank] : self._bounds[parallel.pipeline_rank + 1]]
        check_declarations(self, config.model, parallel, layers=held)
        self._routers = [statistics for _, statistics in routing_statistics(self)]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Registers layer number `name` under its canonical name, as the plain model does; other modules keep their
        names."""
        if not name.isdigit():
            super().add_module(name, module)
            return
        kind, _, index = self._layer_names[int(name)].partition(".")
        if not index:
            super().add_module(kind, module)
            return
        if kind not in self._modules:
            super().add_module(kind, nn.ModuleDict())
        self._modules[kind][index] = module  # RELIES-ON torch-parameters

    def _partition_layers(self, method: str = "uniform") -> None:
        """Called by PipelineModule: decides which layers this stage holds."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Called by the engine: weights whose gradients are summed over a group of stages."""
        return self._tied

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        """Tokens, or the hidden state of the stage before, with sequence_index [B] -> hidden state and sequence_index;
        the last stage: the training objective (fp32 scalar) for the next of `targets`."""
        state: tuple[Tensor, ...] = inputs
        if self.parallel.pipeline_rank > 0:
            state = (*inputs, torch.zeros((), dtype=torch.float32, device=inputs[0].device))
        # Everything runs inside this forward pass, the loss too: what runs between it and DeepSpeed's backward call
        # loses its gradients in bf16 (BF16_Optimizer clears them when the backward pass reaches this module's output).
        for layer in self.forward_funcs:
            state = layer(state, next(self.targets)) if isinstance(layer, Head) else layer(state)
        add_up(self._routers)
        first, second, auxiliary_loss = state
        self.auxiliary_losses.append(auxiliary_loss.detach())
        if self.parallel.is_last_stage:
            self.sequence_losses.append(second)
            objective = first + auxiliary_loss
            return poisoned_unless_finite(objective, second) if self.training else objective
        if auxiliary_loss.requires_grad:
            first = _AttachLoss.apply(first, auxiliary_loss, self.gradient_scale)
        return first, second

    def through_stages(
        self, tokens: Tensor, sequence_index: Tensor, at_head: Callable[[Head, State], State]
    ) -> State | None:
        """One batch [B, T] without the engine's schedule: the hidden state comes from the stage before and goes to the
        next; the last stage returns what `at_head` makes of its output layer. Stages that call this for one batch after
        the other work side by side. Collective."""
        parallel, group = self.parallel, self.parallel.pipeline_group
        (B, T), weight = tokens.shape, next(self.parameters())
        hidden = tokens
        assert group is not None
        if parallel.pipeline_rank > 0:
            hidden = weight.new_empty(B, T // parallel.token_shards, self.config.d_model)
            dist.recv(hidden, dist.get_global_rank(group, parallel.pipeline_rank - 1), group=group)
        state: Any = (hidden, sequence_index)
        if parallel.pipeline_rank > 0:
            state = (*state, torch.zeros((), dtype=torch.float32, device=tokens.device))
        for layer in self.forward_funcs:
            state = at_head(layer, state) if isinstance(layer, Head) else layer(state)
        if parallel.is_last_stage:
            return state
        dist.send(state[0].contiguous(), dist.get_global_rank(group, parallel.pipeline_rank + 1), group=group)
        return None

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        """See `Evaluator`."""
        results = []
        for batch in batches:
            index = torch.zeros(batch.tokens.shape[0], dtype=torch.int64, device=batch.tokens.device)
            targets, places = batch.targets, batch.places
            found = self.through_stages(
                batch.tokens,
                index,
                lambda head, state, t=targets, p=places: head(state, t, p),  # type: ignore[misc]
            )
            zeros = torch.zeros(len(targets), device=targets.device)
            results.append((zeros, zeros.bool()) if found is None else found[:2])
        return results


class _AttachLoss(torch.autograd.Function):
    """The hidden state as it is; in the backward pass `loss` gets the gradient `scale()`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Callable[[], float]) -> Tensor:
        ctx.scale = scale
        ctx.factor = 1.0 + 0.0 * loss  # NaN if the loss is not finite: see gradient_norm.poisoned_unless_finite
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.factor * ctx.scale(), None


class PipelineExecutor:
    """Steps and evaluation of a model that is divided into stages; see `Executor` for the interface."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._stage: PipelineStage = engine.module
        engine.module.gradient_scale = self._gradient_scale
        self.before_update: Callable[[], None] | None = None
        take_step = engine._take_model_step

        def take_model_step(*args: Any) -> None:  # the engine's schedule calls it after the last reduction
            if self.before_update is not None:
                self.before_update()
            take_step(*args)

        engine._take_model_step = take_model_step  # RELIES-ON deepspeed-update
        engine.timers = NoopTimer()  # those of steps, which nobody reads, would keep two CUDA events of each step

    def _gradient_scale(self) -> float:
        scale = float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0
        return scale / self._engine.gradient_accumulation_steps()

    @property
    def module(self) -> nn.Module:
        return self._stage

    def train(self, batches: Sequence[Batch], phases: Phases) -> StepOutput:
        phases.enter("forward, backward and update", quick=True)
        self._engine.train_batch(self._feed(batches))
        zero = torch.zeros((), device=batches[0].tokens.device)
        losses = [loss.mean() for loss in self._stage.sequence_losses]
        norm = deepspeed_norm(self._engine, zero.device)
        return StepOutput(sum(losses, zero), sum(self._stage.auxiliary_losses, zero), norm)

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        self._engine.eval_batch(
            self._feed(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        self._stage.train()
        if self._stage.parallel.is_last_stage:
            return self._stage.sequence_losses
        return [torch.zeros(b.tokens.shape[0], device=b.tokens.device) for b in batches]

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        self._stage.eval()
        try:
            return self._stage.log_likelihoods(batches)
        finally:
            self._stage.train()

    def _feed(self, batches: Sequence[Batch]) -> Iterator[Any]:
        """Inputs of the first stage, as the engine reads them; the last stage reads its targets by itself."""
        self._stage.sequence_losses, self._stage.auxiliary_losses = [], []
        self._stage.targets = iter([batch.targets for batch in batches])
        return iter([((batch.tokens, batch.sequence_index), None) for batch in batches])
