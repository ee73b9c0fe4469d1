"""Checkpoints: every rank writes the pieces of the fp32 state that it owns; any ranks and ZeRO stage read them.

A checkpoint is the folder checkpoints/step-NNNNNNNN with
    rank-RRRRR.safetensors   tensors `master/NAME/START`, `exp_avg/...`, `exp_avg_sq/...` (flat pieces of parameters),
                             `rng/cpu` (uint8; training itself draws nothing, see model/dropout.py, and no
                             other generator is saved), `memory/LAYER` (Transformer-XL: inputs of the last tokens of
                             this rank's streams, a row each) with `memory_streams` (int64), and in the file of a
                             pipeline stage's first rank `routing/NAME` and, of MoA, `routing/NAME/STATISTIC` (fp64).
                             The last of several stages also writes its copy of a tied embedding as `head.weight`:
                             sums in another order may tell it from the first stage's in the last bit
    state.json               everything else, with size, sha256 and tensor- and expert-parallel rank of the files above
It is written as step-NNNNNNNN.partial and renamed once complete: a folder with the final name is a whole checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.language_model import build_on_meta, routing_statistics
from model.memory import layer_memories
from model.parallel.collectives import gather_tokens, own_tokens
from model.parallel.context import ParallelContext
from model.parallel.sharding import Axis, full_shape, local_part, owner_of, shard_place, sharded_axis, sharded_dim
from pretrain.atomic import sha256, sync_directory, write_json
from pretrain.errors import UserError
from pretrain.paths import REPOSITORY
from pretrain.progress import Progress
from pretrain.zero_state import MOMENTS, optimizer_steps, pieces, set_optimizer_steps

FORMAT_VERSION = 1
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
STATE_FILE = "state.json"


class DamagedCheckpoint(UserError):
    """The folder does not hold what its state.json promises; another checkpoint may serve."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder and parsed state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress.from_json(self.state["progress"])

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Parses state.json and checks that the files are there with their sizes.

        Raises DamagedCheckpoint, or a plain UserError for a checkpoint that is whole but of another format."""
        if not path.is_dir():
            raise UserError(
                f"checkpoint.resume: there is no checkpoint folder {path}; use auto, never or a step-... folder"
            )
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            version, files = state["format_version"], state["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"checkpoint {path}: {STATE_FILE} cannot be read ({error})") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {path}: is of format {version}, this version reads {FORMAT_VERSION}; continue with the "
                f"version that wrote it, or choose another --run-dir"
            )
        for name, entry in files.items():
            if Path(name).name != name:
                raise DamagedCheckpoint(f"checkpoint {path}: file name {name!r} leaves the folder")
            size = (path / name).stat().st_size if (path / name).exists() else None
            if size != entry["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise DamagedCheckpoint(f"checkpoint {path}: {name} is {found}, not {entry['bytes']} bytes")
        return cls(path, state)

    def damaged_file(self, *, rank: int, world_size: int) -> str | None:
        """Checks this rank's share of the sha256 sums; the name of a file that does not match, or None."""
        for name in sorted(self.state["files"])[rank::world_size]:
            if sha256(self.path / name) != self.state["files"][name]["sha256"]:
                return name
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Only folders named step-NNNNNNNN: a copy under another name is the
    user's, never resumed from by itself and never removed."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints of steps after `step`, which a run that starts there will write anew. Returns the new
    names; nothing is deleted."""
    renamed = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            number = 1
            while (target := path.with_name(f"superseded-{number}-{path.name}")).exists():
                number += 1
            path.rename(target)
            renamed.append(target)
    return renamed


def _remove(path: Path) -> None:
    """Removes a checkpoint; if it is interrupted, what is left no longer has the name of a whole one."""
    doomed = path.with_name(path.name + ".partial")
    path.rename(doomed)
    shutil.rmtree(doomed)


def layout(engine: Any, parallel: ParallelContext) -> dict[str, int]:
    """Sizes that decide how state is divided over the rank files."""
    return {
        "data": parallel.data_size,
        "tensor": parallel.tensor_size,
        "pipeline": parallel.pipeline_size,
        "expert": parallel.expert_size,
        "zero": engine.zero_optimization_stage(),
    }


def save(
    engine: Any,
    parallel: ParallelContext,
    folder: Path,
    progress: Progress,
    *,
    extra: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes a checkpoint; collective over all ranks. `extra` joins state.json. Returns its folder."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        for stale in folder.glob("step-*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    dist.barrier()

    file = partial / f"rank-{rank:05d}.safetensors"
    save_file(owned_tensors(engine, parallel), file)
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    entries: list[Any] = [None] * world_size
    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    place = {"tensor_rank": parallel.tensor_rank, "expert_rank": parallel.expert_rank}
    dist.all_gather_object(entries, (file.name, {**entry, **place}))

    if rank == 0:
        write_json(
            partial / STATE_FILE,
            {
                "format_version": FORMAT_VERSION,
                "progress": progress.to_json(),
                "optimizer_steps": optimizer_steps(engine),
                "loss_scaler": _loss_scaler(engine),
                "parameters": full_shapes(engine.module.config),
                "layout": layout(engine, parallel),
                "versions": versions(),
                "files": dict(entries),
                **extra,
            },
        )
        os.rename(partial, final)
        sync_directory(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            _remove(old)
    dist.barrier()
    return final


def load_weights(checkpoint: Checkpoint, model: Any, parallel: ParallelContext) -> None:
    """Fills a model that ZeRO has not yet sharded with this rank's part of the checkpoint's fp32 weights."""
    store = _PieceStore(checkpoint, model.config, parallel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = full_shape(list(parameter.shape), name, model.config, parallel)
            saved = checkpoint.state["parameters"].get(owner_of(name, model.config))
            if shape != saved:
                raise UserError(f"checkpoint {checkpoint.path}: {name} has shape {saved}, the model's is {shape}")
            parameter.copy_(store.read("master", name, 0, parameter.numel()).view_as(parameter))


def load_training_state(
    checkpoint: Checkpoint, engine: Any, parallel: ParallelContext, *, with_memory: bool = True
) -> None:
    """Restores this rank's masters, moments, step counters, routing statistics, the memory of the streams that were
    assigned to this rank (not without `with_memory`), loss scale and RNG state."""
    store = _PieceStore(checkpoint, engine.module.config, parallel)
    with torch.no_grad():
        for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=False):
            stop = piece.start + piece.master.numel()
            piece.master.copy_(store.read("master", piece.name, piece.start, stop))
            for key in MOMENTS:
                piece.moments[key].copy_(store.read(key, piece.name, piece.start, stop))
    set_optimizer_steps(engine, checkpoint.state["optimizer_steps"])
    for key, value in (checkpoint.state["loss_scaler"] or {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)
    for name, statistics in routing_statistics(engine.module):
        for key, value in statistics.state().items():
            value.copy_(store.routing(_routing_key(name, key)))
    for name, memory in layer_memories(engine.module) if with_memory else ():
        memory.kept = _own_memory(
            store.memory(name, memory.streams, memory.num_streams), engine.module.config, parallel
        )
    # Nothing in training draws from torch's generator (dropout masks are functions of position); kept so that code
    # which a user adds resumes as well. Another number of ranks has no counterpart for every rank.
    if len(checkpoint.state["files"]) == dist.get_world_size():
        torch.set_rng_state(store.rng_state(dist.get_rank()))


class _PieceStore:
    """Reads any range of this rank's part of any parameter's state out of the rank files, by memory map.

    state.json says of each file which part of tensor- and of expert-parallel parameters its pieces belong to. Where a
    parameter was saved in as many parts as this run has, a range is read as it is; else the whole parameter is put
    together and cut anew.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, parallel: ParallelContext) -> None:
        self._config, self._parallel = config, parallel
        self._shapes = checkpoint.state["parameters"]
        # Older checkpoints know no expert parallelism, the first ones no tensor parallelism.
        self._saved = {axis: int(checkpoint.state["layout"].get(axis, 1)) for axis in ("tensor", "expert")}
        self._files = {
            name: safetensors.safe_open(checkpoint.path / name, framework="pt") for name in checkpoint.state["files"]
        }
        self._pieces: dict[tuple[str, str, int], list[tuple[int, int, str]]] = defaultdict(list)
        for file, handle in self._files.items():
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                kind, _, rest = key.partition("/")
                if kind == "master" or kind in MOMENTS:
                    name, _, start = rest.rpartition("/")
                    length = handle.get_slice(key).get_shape()[0]
                    part = self._part_in(file, checkpoint.state["files"][file], name)
                    self._pieces[kind, name, part].append((int(start), length, file))

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of this rank's flattened part, fp32. Raises UserError if the files lack some."""
        if (kind, name, 0) not in self._pieces:  # no pipeline's last stage saved its copy of the tied embedding
            name = owner_of(name, self._config)
        dim, (own_part, parts) = sharded_dim(name, self._config), shard_place(name, self._config, self._parallel)
        saved_axis = self._saved_axis(name)
        saved_parts = 1 if saved_axis is None else self._saved[saved_axis]
        if dim is None or saved_parts == parts:
            return self._read_part(kind, name, own_part, start, stop)
        shape = list(self._shapes[name])
        shape[dim] //= saved_parts
        whole = [self._read_part(kind, name, part, 0, math.prod(shape)).view(shape) for part in range(saved_parts)]
        return local_part(torch.cat(whole, dim), name, self._config, self._parallel).reshape(-1)[start:stop]

    def _saved_axis(self, name: str) -> Axis | None:
        return sharded_axis(name, self._config, expert_size=self._saved["expert"])

    def _part_in(self, file: str, entry: dict[str, Any], name: str) -> int:
        """Which part of the parameter `name` the pieces of a rank's file belong to."""
        axis = self._saved_axis(name)
        if axis is None:
            return 0
        if f"{axis}_rank" in entry:
            return int(entry[f"{axis}_rank"])
        # An older checkpoint, of data- and tensor-parallel ranks.
        return int(Path(file).stem.removeprefix("rank-")) % self._saved["tensor"]

    def _read_part(self, kind: str, name: str, part: int, start: int, stop: int) -> Tensor:
        result = torch.empty(stop - start)
        covered = 0
        for first, length, file in self._pieces[kind, name, part]:
            low, high = max(first, start), min(first + length, stop)
            if low < high:
                found = self._files[file].get_slice(f"{kind}/{name}/{first}")[low - first : high - first]
                result[low - start : high - start] = found
                covered += high - low
        if covered != stop - start:
            raise UserError(f"checkpoint: {kind} of {name} is incomplete ({covered} of {stop - start} elements)")
        return result

    def memory(self, layer: str, streams: Tensor, num_streams: int) -> Tensor | None:
        """[n, m, d], a row for each of `streams` [n], in the dtype of the run; None if there was no memory yet."""
        key, place = f"memory/{layer}", {}
        for file, handle in self._files.items():
            if key in handle.keys():  # noqa: SIM118
                place.update({s: (file, row) for row, s in enumerate(handle.get_tensor("memory_streams").tolist())})
        if not place:
            return None
        if len(place) != num_streams:
            raise UserError(
                f"batch.global_sequences: the checkpoint holds the memory of {len(place)} streams of text, this run "
                f"reads {num_streams}; set batch.global_sequences to {len(place)}, as Transformer-XL memory needs it"
            )
        slices = {file: self._files[file].get_slice(key) for file, _ in place.values()}
        rows = [slices[file][row : row + 1] for file, row in (place[s] for s in streams.tolist())]
        return torch.cat(rows).to(streams.device)

    def routing(self, key: str) -> Tensor:
        """The statistic `key`, which the first rank of the router's pipeline stage saved."""
        return next(handle for handle in self._files.values() if key in handle.keys()).get_tensor(key)  # noqa: SIM118

    def rng_state(self, rank: int) -> Tensor:
        return self._files[f"rank-{rank:05d}.safetensors"].get_tensor("rng/cpu")


def full_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Shape of every parameter of the model by canonical name."""
    return {name: list(p.shape) for name, p in build_on_meta(config).named_parameters()}


def owned_tensors(engine: Any, parallel: ParallelContext) -> dict[str, Tensor]:
    """What no other rank saves: of what tensor-parallel ranks share, the first one's."""
    tensors = {"rng/cpu": torch.get_rng_state()}
    is_first_part = parallel.tensor_rank == 0
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=True):
        if not is_first_part and sharded_dim(piece.name, engine.module.config) is None:
            continue
        for kind, value in {"master": piece.master, **piece.moments}.items():
            # A copy: pieces of one flat tensor share memory, which safetensors refuses.
            tensors[f"{kind}/{piece.name}/{piece.start}"] = value.detach().to("cpu", torch.float32, copy=True)
    for name, memory in layer_memories(engine.module):
        if memory.kept is None:
            continue
        kept = _whole_memory(memory.kept, engine.module.config, parallel)
        if is_first_part:
            tensors[f"memory/{name}"] = kept.cpu().contiguous()
            tensors["memory_streams"] = memory.streams.cpu().clone()
    if parallel.data_rank == 0 and is_first_part:
        for name, statistics in routing_statistics(engine.module):
            for key, value in statistics.state().items():
                tensors[_routing_key(name, key)] = value.cpu().clone()
    return tensors


def _whole_memory(kept: Tensor, config: ModelConfig, parallel: ParallelContext) -> Tensor:
    """[n, m, d] of all tokens from those [n, m / ranks, d] that a rank keeps under sequence parallelism; collective."""
    if not parallel.sequence_parallel:
        return kept
    chunk = config.sequence_length // parallel.tensor_size
    return gather_tokens(kept, parallel.tensor_group, chunk=chunk)


def _own_memory(kept: Tensor | None, config: ModelConfig, parallel: ParallelContext) -> Tensor | None:
    """What `_whole_memory` puts together."""
    if kept is None or not parallel.sequence_parallel:
        return kept
    chunk = config.sequence_length // parallel.tensor_size
    return own_tokens(kept, rank=parallel.tensor_rank, size=parallel.tensor_size, chunk=chunk)


def _routing_key(name: str, key: str) -> str:
    """`routing/NAME` is the mean routing distribution, the only statistic of most routers."""
    return f"routing/{name}" if key == "probability" else f"routing/{name}/{key}"


def _loss_scaler(engine: Any) -> dict[str, Any] | None:
    """State of DeepSpeed's dynamic loss scaling; None but for fp16."""
    if not engine.fp16_enabled():
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in LOSS_SCALER_FIELDS}


def versions() -> dict[str, str | None]:
    """What computes: recorded in every checkpoint, and compared on resume."""
    import deepspeed

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "git": git.stdout.strip() or None,
    }
