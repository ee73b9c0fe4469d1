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
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.git import revision
from common.paths import REPOSITORY
from model.config import ModelConfig
from model.language_model import routing_statistics
from model.memory import LayerMemory, layer_memories
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_shape, shard_place
from model.parameter_spec import ParameterSpec
from model.parameters import parameter_specs
from pretrain.checkpoint.folder import FORMAT_VERSION
from pretrain.checkpoint.fragments import Chunk, Fragments, flat_range, single_fragment
from pretrain.checkpoint.shapes import full_shapes
from pretrain.data.progress import Progress
from pretrain.engine.zero_state import optimizer_steps, pieces

State = dict[str, Fragments]
# RELIES-ON deepspeed-loss-scale
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def owned_state(engine: Any, parallel: ParallelContext) -> State:
    """The state that this rank alone saves; the first tensor-parallel rank saves what all of them share. Views of the
    engine's memory."""
    config: ModelConfig = engine.module.config
    specs = parameter_specs(config)
    is_first_part = parallel.tensor_rank == 0
    state = {rng_key(dist.get_rank()): single_fragment(torch.get_rng_state())}
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=True):
        if is_first_part or specs[piece.name].divided is not None:
            for kind, value in piece.tensors.items():
                assert value.dtype == torch.float32
                state[f"{kind}/{piece.name}"] = fragments_of(value, piece.start, specs[piece.name], parallel)
    for name, memory in layer_memories(engine.module):
        if memory.kept is not None and (is_first_part or parallel.sequence_parallel):
            state[f"memory/{name}"] = memory_fragments(memory, memory.kept, config, parallel)
    if parallel.data_rank == 0 and is_first_part:
        for name, statistics in routing_statistics(engine.module):
            for key, value in statistics.state().items():
                state[routing_key(name, key)] = single_fragment(value)
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


def fragments_of(flat: Tensor, start: int, spec: ParameterSpec, parallel: ParallelContext) -> Fragments:
    """Elements start .. start + len(flat) of this rank's flattened part of a parameter."""
    dim, (part, _), shape = spec.divided, shard_place(spec, parallel), local_shape(spec, parallel)
    return flat_range(
        flat, start, local_shape=shape, shape=spec.shape, dim=dim, offset=0 if dim is None else part * shape[dim]
    )


def memory_fragments(memory: LayerMemory, kept: Tensor, config: ModelConfig, parallel: ParallelContext) -> Fragments:
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


def routing_key(name: str, key: str) -> str:
    """`routing/NAME` is the mean routing distribution, the only statistic of most routers."""
    return f"routing/{name}" if key == "probability" else f"routing/{name}/{key}"


def rng_key(rank: int) -> str:
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
    return {"python": platform.python_version(), "torch": torch.__version__, "git": revision(REPOSITORY)}
