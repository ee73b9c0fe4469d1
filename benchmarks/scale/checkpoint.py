"""A checkpoint of many ranks: every rank's local plan, the first rank's global one, the folder, and who opens which
file when a run resumes. Tensors have shapes and no data; files are empty."""

from __future__ import annotations

import math
import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.scale.figures import Figure
from model.language_model import build_on_meta
from model.parameters import parameter_specs
from pretrain.checkpoint.folder import FORMAT_VERSION, STATE_FILE, TENSORS_FILE, Checkpoint
from pretrain.checkpoint.fragments import Fragments, flat_range, single_fragment
from pretrain.checkpoint.planners import SavePlanner
from pretrain.checkpoint.storage import Reader, Writer
from pretrain.config.schema import Config
from pretrain.engine.optimizer import parameter_groups
from pretrain.engine.zero_state import MOMENTS

KINDS = ("master", *MOMENTS)
ALIGNMENT = 2
"""Elements by which DeepSpeed's ZeRO 1 and 2 pad the part of a rank."""


def owned_parts(config: Config, ranks: int) -> list[list[tuple[str, int, int]]]:
    """What ZeRO 1 gives to each of `ranks` data-parallel ranks: (parameter, first element, elements). DeepSpeed lays
    the parameters of a group one after the other and cuts them into equal parts."""
    model = build_on_meta(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: list[list[tuple[str, int, int]]] = [[] for _ in range(ranks)]
    for group in parameter_groups(model, config):
        total = sum(parameter.numel() for parameter in group["params"])
        share = math.ceil(total / (ALIGNMENT * ranks)) * ALIGNMENT
        begin = 0
        for parameter in group["params"]:
            end = begin + parameter.numel()
            for rank in range(begin // share, -(-end // share)):
                first, last = max(begin, rank * share), min(end, (rank + 1) * share)
                found[rank].append((names[parameter], first - begin, last - first))
            begin = end
    return found


def states(config: Config, ranks: int) -> Iterator[dict[str, Fragments]]:
    """What each rank saves, as checkpoint/state.py describes it."""
    specs = parameter_specs(config.model)
    for rank, parts in enumerate(owned_parts(config, ranks)):
        state = {f"rng/cpu/{rank:05d}": single_fragment(torch.empty(torch.get_rng_state().shape, dtype=torch.uint8))}
        for name, start, length in parts:
            shape = specs[name].shape
            for kind in KINDS:
                flat = torch.empty(length, device="meta")
                state[f"{kind}/{name}"] = flat_range(flat, start, local_shape=shape, shape=shape, dim=None, offset=0)
        yield state


def planner_for(state: dict[str, Fragments], *, is_first: bool) -> SavePlanner:
    planner = SavePlanner()
    planner.set_up_planner(state_dict=state, storage_meta=None, is_coordinator=is_first)
    return planner


def figures(ranks: int, config: Config) -> list[Figure]:
    started = time.process_time()
    plans = []
    planner: SavePlanner | None = None
    for rank, state in enumerate(states(config, ranks)):
        own = planner_for(state, is_first=rank == 0)
        planner = planner or own
        plans.append(own.create_local_plan())
    assert planner is not None
    local_seconds, sent = time.process_time() - started, [len(pickle.dumps(plan)) for plan in plans]

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder) / "step-00000001", {"format_version": FORMAT_VERSION})
        started = time.process_time()
        planned, metadata = planner.create_global_plan(plans)
        global_seconds = time.process_time() - started
        planned = writer.prepare_global_plan(planned)
        started = time.process_time()
        again, _ = planner.create_global_plan([SavePlan([], usable=False)] * ranks)
        again_seconds = time.process_time() - started
        assert not any(plan.usable for plan in again)

        results = []
        for plan in planned:
            (writer.partial / plan.storage_data).touch()
            file = {"name": plan.storage_data, "bytes": 0, "sha256": "0" * 64}
            results.append([WriteResult(item.index, item.tensor_storage_size() or 0, file) for item in plan.items])
        result_bytes = max(len(pickle.dumps(result)) for result in results)
        started = time.process_time()
        writer.finish(metadata, results)
        commit_seconds = time.process_time() - started

        times = {}
        for what, shares in (("all", 1), ("share", ranks), ("none", 0)):
            started = time.process_time()
            checkpoint = Checkpoint.open(writer.final, world_size=shares)
            times[what] = time.process_time() - started
        started = time.process_time()
        read = Reader(checkpoint).read_metadata()
        parse_seconds = time.process_time() - started
        sizes = {name: (writer.final / name).stat().st_size for name in (TENSORS_FILE, STATE_FILE)}
        files = sum(1 for _ in writer.final.iterdir())
    opened_before, opened = opened_files(config, ranks, read.storage_data)
    items = [len(plan.items) for plan in planned]
    parameters = sum(math.prod(spec.shape) for spec in parameter_specs(config.model).values())
    return [
        Figure("files", files, "files"),
        Figure("bytes of tensors", 12 * parameters, "bytes"),
        Figure("  of a rank: file, and buffer in CPU memory", 12 * parameters / ranks, "bytes"),
        Figure("rectangles of all ranks", sum(items), "items"),
        Figure("local plan: CPU of a rank", 1e3 * local_seconds / ranks, "ms"),
        Figure("first save: sent to rank 0 by a rank, the largest", max(sent), "bytes"),
        Figure("  received by rank 0", max(sent) * ranks, "bytes"),  # torch's gather_object pads all to the largest
        Figure("  global plan on rank 0", 1e3 * global_seconds, "ms"),
        Figure("later saves: sent to rank 0 by a rank", len(pickle.dumps(SavePlan([], usable=False))), "bytes"),
        Figure("  global plan on rank 0", 1e3 * again_seconds, "ms"),
        Figure("each save: results of a rank, sent to rank 0", result_bytes, "bytes"),
        Figure("  index and commit on rank 0", 1e3 * commit_seconds, "ms"),
        Figure(TENSORS_FILE, sizes[TENSORS_FILE], "bytes"),
        Figure(STATE_FILE, sizes[STATE_FILE], "bytes"),
        Figure("resume: CPU of a rank to open it, all sizes", 1e3 * times["all"], "ms"),
        Figure("  a share of the sizes", 1e3 * times["share"], "ms"),
        Figure(f"  and to read {TENSORS_FILE}", 1e3 * parse_seconds, "ms"),
        Figure("  files that all ranks open for the weights", opened, "files"),
        Figure("  if each read all weights", opened_before, "files"),
    ]


def opened_files(config: Config, ranks: int, places: dict[object, str]) -> tuple[int, int]:
    """How many files all ranks open to get the weights: if each reads all of them, and if they take turns as
    `load_weights_together` lets them."""
    of_parameter: dict[str, set[str]] = {}
    for index, file in places.items():
        kind, _, name = index.fqn.partition("/")  # type: ignore[attr-defined]
        if kind == "master":
            of_parameter.setdefault(name, set()).add(file)
    by_reader: dict[int, set[str]] = {}
    for number, (name, _) in enumerate(build_on_meta(config.model).named_parameters()):
        by_reader.setdefault(number % ranks, set()).update(of_parameter[name])
    return ranks * len(set().union(*of_parameter.values())), sum(map(len, by_reader.values()))
