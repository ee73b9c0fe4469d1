"""Which tensors of a run a checkpoint holds, under names and shapes that are the same in every layout.

    master/NAME, exp_avg/NAME, exp_avg_sq/NAME   fp32, of the whole parameter. The last of several pipeline stages also
                             saves its copy of a tied embedding, as head.weight: sums in another order may tell it from
                             the first stage's in the last bit
    ema/NAME                 fp32, the moving average of the weights, of runs with train.ema_decay
    memory/LAYER             [streams, m, d], Transformer-XL: inputs of the last tokens of every stream of text
    routing/NAME             fp64, a router's mean routing distribution; MoA's other statistics: routing/NAME/STATISTIC
    rng/cpu/RANK             uint8 (training itself draws nothing, see model/dropout.py; no other generator is saved)

Every element is saved by one rank. Nothing is gathered: a rank describes what it owns as rectangles (fragments.py).
"""

from __future__ import annotations

import functools
import platform
import subprocess
import time
import warnings
from collections.abc import Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.errors import UserError
from common.paths import REPOSITORY
from model.config import ModelConfig
from model.language_model import routing_statistics
from model.memory import LayerMemory, layer_memories
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_shape, shard_place, sharded_axis
from model.parameter_spec import ParameterSpec
from model.parameters import owner_of, parameter_specs
from pretrain.checkpoint.folder import FORMAT_VERSION, Checkpoint
from pretrain.checkpoint.fragments import Chunk, Fragments, flat_range, single_fragment
from pretrain.checkpoint.planners import LoadPlanner
from pretrain.checkpoint.shapes import full_shapes
from pretrain.checkpoint.storage import Reader
from pretrain.data.progress import Progress
from pretrain.device import on_collective_device
from pretrain.engine.zero_state import AVERAGE, Piece, optimizer_steps, pieces, set_optimizer_steps
from pretrain.parallel.agreement import agreed
from pretrain.parallel.groups import replica_group

State = dict[str, Fragments]
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def owned_state(engine: Any, parallel: ParallelContext) -> State:
    """The state that this rank alone saves; the first tensor-parallel rank saves what all of them share. Views of the
    engine's memory."""
    config: ModelConfig = engine.module.config
    specs = parameter_specs(config)
    is_first_part = parallel.tensor_rank == 0
    state = {_rng_key(dist.get_rank()): single_fragment(torch.get_rng_state())}
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=True):
        if is_first_part or specs[piece.name].divided is not None:
            for kind, value in piece.tensors.items():
                assert value.dtype == torch.float32
                state[f"{kind}/{piece.name}"] = _fragments(value, piece.start, specs[piece.name], parallel)
    for name, memory in layer_memories(engine.module):
        if memory.kept is not None and (is_first_part or parallel.sequence_parallel):
            state[f"memory/{name}"] = _memory_fragments(memory, memory.kept, config, parallel)
    if parallel.data_rank == 0 and is_first_part:
        for name, statistics in routing_statistics(engine.module):
            for key, value in statistics.state().items():
                state[_routing_key(name, key)] = single_fragment(value)
    return state


def constants(engine: Any, parallel: ParallelContext) -> dict[str, Any]:
    """The entries of state.json that are the same in every checkpoint of an engine."""
    return {
        "format_version": FORMAT_VERSION,
        "parameters": full_shapes(engine.module.config),
        "layout": layout(engine, parallel),
        "versions": versions(),
    }


def described(engine: Any, progress: Progress) -> dict[str, Any]:
    """The entries of state.json that describe this moment of a run, without the losses."""
    return {
        "time": time.time(),
        "progress": progress.to_json(),
        "optimizer_steps": optimizer_steps(engine),
        "loss_scaler": _loss_scaler(engine),
    }


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
            fragments = _fragments(parameter.detach().view(-1), 0, specs[name], parallel)
            state[_saved_as(reader, kind, name, config)] = fragments
    if state:
        read(reader, checkpoint, state)


def check_kind(reader: Reader, kind: str) -> None:
    """Raises UserError if a moving average is wanted, and the checkpoint holds none."""
    names = reader.read_metadata().state_dict_metadata
    if kind == AVERAGE and not any(name.startswith(f"{AVERAGE}/") for name in names):
        raise UserError(
            f"{reader.what}: holds no moving average of the weights; leave --ema out, or train with train.ema_decay"
        )


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
            fragments = _fragments(value, piece.start, specs[piece.name], parallel)
            state[_saved_as(reader, kind, piece.name, config)] = fragments
    for name, statistics in routing_statistics(engine.module):
        state |= {_routing_key(name, key): single_fragment(value) for key, value in statistics.state().items()}
    memories: list[tuple[LayerMemory, Tensor]] = []
    for name, memory in layer_memories(engine.module) if with_memory else ():
        if (there := saved.get(f"memory/{name}")) is not None:
            kept = _empty_memory(there, memory, config, parallel)
            state[f"memory/{name}"] = _memory_fragments(memory, kept, config, parallel)
            memories.append((memory, kept))
    # Nothing in training draws from torch's generator (dropout masks are functions of position); its state is kept so
    # that code which a user adds resumes as well. If the number of ranks has changed, a rank may have no saved state.
    generator = torch.get_rng_state()
    has_generator = sum(name.startswith("rng/") for name in saved) == dist.get_world_size()
    if has_generator:
        state[_rng_key(dist.get_rank())] = single_fragment(generator)

    read(reader, checkpoint, state)

    for piece in begun:
        assert piece.average is not None
        piece.average.copy_(piece.master)
    for memory, kept in memories:
        memory.kept = kept.to(memory.streams.device)
    if has_generator:
        torch.set_rng_state(generator)
    set_optimizer_steps(engine, checkpoint.state["optimizer_steps"])
    for key, value in (checkpoint.state["loss_scaler"] or {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)


def read(reader: Reader, checkpoint: Checkpoint, state: State) -> None:
    """Fills `state` in place, on this rank alone. Raises UserError with what is missing."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
        try:
            dcp.load(state, storage_reader=reader, planner=LoadPlanner(f"checkpoint {checkpoint.path}"), no_dist=True)
        except dcp.CheckpointException as failure:
            error, _ = next(iter(failure.failures.values()))
            raise error from None


def _fragments(flat: Tensor, start: int, spec: ParameterSpec, parallel: ParallelContext) -> Fragments:
    """Elements start .. start + len(flat) of this rank's flattened part of a parameter."""
    dim, (part, _), shape = spec.divided, shard_place(spec, parallel), local_shape(spec, parallel)
    return flat_range(
        flat, start, local_shape=shape, shape=spec.shape, dim=dim, offset=0 if dim is None else part * shape[dim]
    )


def _saved_as(reader: Reader, kind: str, name: str, config: ModelConfig) -> str:
    """The tensor to restore `name` from: the first stage's embedding where no last stage saved its copy."""
    key = f"{kind}/{name}"
    return key if key in reader.read_metadata().state_dict_metadata else f"{kind}/{owner_of(name, config)}"


def _memory_fragments(memory: LayerMemory, kept: Tensor, config: ModelConfig, parallel: ParallelContext) -> Fragments:
    """Fragments of `kept` [n, m, d]: neighbouring streams share one. Under sequence parallelism each chunk of
    sequence_length tokens has its own, with this rank's tokens."""
    ranks = parallel.token_shards
    share = config.sequence_length // ranks if ranks > 1 else kept.shape[1]
    streams, chunks, row = memory.streams.tolist(), [], 0
    while row < len(streams):
        end = row + 1
        while end < len(streams) and streams[end] == streams[end - 1] + 1:
            end += 1
        for number, token in enumerate(range(0, kept.shape[1], share)):
            place = (streams[row], (number * ranks + parallel.tensor_rank) * share if ranks > 1 else 0, 0)
            chunks.append(Chunk(place, kept[row:end, token : token + share]))
        row = end
    return Fragments((memory.num_streams, kept.shape[1] * ranks, kept.shape[2]), chunks)


def _empty_memory(saved: Any, memory: LayerMemory, config: ModelConfig, parallel: ParallelContext) -> Tensor:
    """[n, m, d] for the streams of this rank, in the dtype of the run that saved it."""
    if saved.size[0] != memory.num_streams:
        raise UserError(
            f"batch.global_sequences: the checkpoint holds the memory of {saved.size[0]} streams of text, this run "
            f"reads {memory.num_streams}; set batch.global_sequences to {saved.size[0]}, as memory needs it"
        )
    tokens = saved.size[1] // parallel.token_shards
    return torch.empty(len(memory.streams), tokens, config.d_model, dtype=saved.properties.dtype)


def _routing_key(name: str, key: str) -> str:
    """`routing/NAME` is the mean routing distribution, the only statistic of most routers."""
    return f"routing/{name}" if key == "probability" else f"routing/{name}/{key}"


def _rng_key(rank: int) -> str:
    return f"rng/cpu/{rank:05d}"


def _loss_scaler(engine: Any) -> dict[str, Any] | None:
    """State of DeepSpeed's dynamic loss scaling; None but for fp16."""
    if not engine.fp16_enabled():
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in LOSS_SCALER_FIELDS}


def layout(engine: Any, parallel: ParallelContext) -> dict[str, int]:
    """Sizes of the parallel dimensions, for people and for the message when they change; loading does not need them."""
    return {
        "data": parallel.data_size,
        "tensor": parallel.tensor_size,
        "pipeline": parallel.pipeline_size,
        "expert": parallel.expert_size,
        "zero": engine.zero_optimization_stage(),
    }


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Versions of the software that computes, recorded in every checkpoint and compared on resume."""
    import deepspeed  # here: device.start prepares its import

    found = dict(code_versions())
    return {"python": found.pop("python"), "torch": found.pop("torch"), "deepspeed": deepspeed.__version__, **found}


@functools.cache
def code_versions() -> Mapping[str, str | None]:
    """Those of them that are known without DeepSpeed. Asked once a process: git is a process of its own, and a checkout
    that changes while a run goes on does not change the run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {"python": platform.python_version(), "torch": torch.__version__, "git": git.stdout.strip() or None}
