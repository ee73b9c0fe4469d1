"""A checkpoint read back: weights into a model, everything into an engine. Imports DCP, which takes two seconds.

Every rank reads its own part of every tensor (state.py describes it), of whatever rank's file holds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Set
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.errors import UserError
from model.config import ModelConfig
from model.language_model import routing_statistics
from model.memory import LayerMemory, layer_memories
from model.parallel.context import ParallelContext
from model.parallel.sharding import sharded_axis
from model.parameters import owner_of, parameter_specs
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.fragments import single_fragment
from pretrain.checkpoint.planners import LoadPlanner
from pretrain.checkpoint.state import State, fragments_of, memory_fragments, rng_key, routing_key
from pretrain.checkpoint.storage import Reader
from pretrain.device import on_collective_device
from pretrain.engine.zero_state import AVERAGE, Piece, pieces, set_optimizer_steps
from pretrain.parallel.agreement import agreed
from pretrain.parallel.groups import replica_group


def load_weights_together(
    checkpoint: Checkpoint, model: Any, parallel: ParallelContext, *, kind: str = "master"
) -> None:
    """As `load_weights`, but of the ranks that hold the same part of a parameter one reads it and sends it to the
    others; they take turns. If each read everything, N ranks would open N files each. Collective; without a process
    group this process reads all. Raises UserError, agreed."""
    specs, senders = parameter_specs(model.config), {}
    for number, (name, _) in enumerate(model.named_parameters()):
        group = replica_group(parallel, sharded_axis(specs[name], expert_size=parallel.expert_size) == "expert")
        if group is not None:
            senders[name] = (group, number % dist.get_world_size(group))
    others = {name for name, (group, sender) in senders.items() if dist.get_rank(group) != sender}
    agreed(lambda: load_weights(checkpoint, model, parallel, kind=kind, without=others))
    for name, parameter in model.named_parameters():
        if name in senders:
            group, sender = senders[name]
            own = parameter.detach()
            sent = on_collective_device(own)
            dist.broadcast(sent, group=group, group_src=sender)
            if sent is not own:
                own.copy_(sent)


def load_weights(
    checkpoint: Checkpoint,
    model: Any,
    parallel: ParallelContext,
    *,
    kind: str = "master",
    without: Set[str] = frozenset(),
) -> None:
    """Fills a model that ZeRO has not yet sharded with this rank's part of the checkpoint's fp32 weights, or of their
    moving average (`kind` ema), but for the parameters named in `without`, which must be there and keep their values.
    Raises UserError."""
    reader, config = Reader(checkpoint), model.config
    if any(name not in without for name, _ in model.named_parameters()):  # else the index need not be read
        check_kind(reader, kind)
    specs = parameter_specs(config)
    state: State = {}
    for name, parameter in model.named_parameters():
        shape = list(specs[name].shape)
        saved = checkpoint.state["parameters"].get(owner_of(name, config))
        if saved is None:
            raise UserError(f"checkpoint {checkpoint.path}: holds no {name}, which this model has")
        if shape != saved:
            raise UserError(f"checkpoint {checkpoint.path}: {name} has shape {saved}, the model's is {shape}")
        assert parameter.is_contiguous()
        if name not in without:
            fragments = fragments_of(parameter.detach().view(-1), 0, specs[name], parallel)
            state[_saved_as(reader, kind, name, config)] = fragments
    if state:
        read(reader, state)


def check_kind(reader: Reader, kind: str) -> None:
    """Raises UserError if a moving average is wanted, and the checkpoint holds none."""
    names = reader.read_metadata().state_dict_metadata
    if kind == AVERAGE and not any(name.startswith(f"{AVERAGE}/") for name in names):
        raise UserError(
            f"{reader.what}: holds no moving average of the weights; leave --ema out, or train with train.ema_decay"
        )


def whole_parameters(checkpoint: Checkpoint, kind: str) -> Callable[[str], Tensor]:
    """A function of a canonical name that reads the whole parameter, fp32, or with `kind` ema its moving average. Both
    raise UserError."""
    reader, shapes = Reader(checkpoint), checkpoint.state["parameters"]
    check_kind(reader, kind)

    def parameter(name: str) -> Tensor:
        values = torch.empty(shapes[name])
        read(reader, {f"{kind}/{name}": single_fragment(values)})
        return values

    return parameter


def load_training_state(
    checkpoint: Checkpoint, engine: Any, parallel: ParallelContext, *, with_memory: bool = True
) -> None:
    """Restores this rank's masters, moments, step counters, routing statistics, loss scale and RNG state and, if
    `with_memory`, the memory of the streams that were assigned to this rank. A moving average that the checkpoint does
    not have begins at its weights. Nothing is communicated."""
    reader, config = Reader(checkpoint), engine.module.config
    saved = reader.read_metadata().state_dict_metadata
    specs = parameter_specs(config)
    state: State = {}
    begun: list[Piece] = []
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=False):
        for kind, value in piece.tensors.items():
            if kind == AVERAGE and _saved_as(reader, kind, piece.name, config) not in saved:
                begun.append(piece)
                continue
            fragments = fragments_of(value, piece.start, specs[piece.name], parallel)
            state[_saved_as(reader, kind, piece.name, config)] = fragments
    for name, statistics in routing_statistics(engine.module):
        state |= {routing_key(name, key): single_fragment(value) for key, value in statistics.state().items()}
    memories: list[tuple[LayerMemory, Tensor]] = []
    for name, memory in layer_memories(engine.module) if with_memory else ():
        if (there := saved.get(f"memory/{name}")) is not None:
            kept = _empty_memory(there, memory, config, parallel)
            state[f"memory/{name}"] = memory_fragments(memory, kept, config, parallel)
            memories.append((memory, kept))
    # Nothing in training draws from torch's generator (dropout masks are functions of position); its state is kept so
    # that code which a user adds resumes as well. If the number of ranks has changed, a rank may have no saved state.
    generator = torch.get_rng_state()
    has_generator = sum(name.startswith("rng/") for name in saved) == dist.get_world_size()
    if has_generator:
        state[rng_key(dist.get_rank())] = single_fragment(generator)

    read(reader, state)

    for piece in begun:
        assert piece.average is not None
        piece.average.copy_(piece.master)
    for memory, kept in memories:
        memory.kept = kept.to(memory.streams.device)
    if has_generator:
        torch.set_rng_state(generator)
    set_optimizer_steps(engine, checkpoint.state["optimizer_steps"])
    for key, value in (checkpoint.state["loss_scaler"] or {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)  # RELIES-ON deepspeed-loss-scale


def read(reader: Reader, state: State) -> None:
    """Fills `state` in place, on this rank alone. Raises UserError with what is missing."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
        try:
            dcp.load(state, storage_reader=reader, planner=LoadPlanner(reader.what), no_dist=True)
        except dcp.CheckpointException as failure:
            error, _ = next(iter(failure.failures.values()))
            raise error from None


def _saved_as(reader: Reader, kind: str, name: str, config: ModelConfig) -> str:
    """The tensor to restore `name` from: the first stage's embedding where no last stage saved its copy."""
    key = f"{kind}/{name}"
    return key if key in reader.read_metadata().state_dict_metadata else f"{kind}/{owner_of(name, config)}"


def _empty_memory(saved: Any, memory: LayerMemory, config: ModelConfig, parallel: ParallelContext) -> Tensor:
    """[n, m, d] for the streams of this rank, in the dtype of the run that saved it."""
    if saved.size[0] != memory.num_streams:
        raise UserError(
            f"batch.global_sequences: the checkpoint holds the memory of {saved.size[0]} streams of text, this run "
            f"reads {memory.num_streams}; set batch.global_sequences to {saved.size[0]}, as memory needs it"
        )
    tokens = saved.size[1] // parallel.token_shards
    return torch.empty(len(memory.streams), tokens, config.d_model, dtype=saved.properties.dtype)
