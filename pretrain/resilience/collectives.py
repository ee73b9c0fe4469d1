"""Which collective does not end, and which ranks did not call it: what torch's flight recorder has of each rank.

torch keeps the newest collectives of a process, those of NCCL and of gloo (TORCH_FR_BUFFER_SIZE of them, 2000 unless
it is set, 0: none). A rank that hangs writes its own into RUN_DIR/hang, from the watchdog's thread; the rank that reads
all reports compares them. Sends and receives do not count: gloo records none, and NCCL numbers them apart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from common.files import write_json
from pretrain.ranks import ranks_text

# RELIES-ON torch-recorder
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Of NCCL's recorder, which builds with CUDA have, and of gloo's; private, so a torch without them records nothing."""
SUFFIX = ".collectives"
NEWEST = 20
"""Calls of each group that a rank writes: ranks that wait for each other are a few calls apart, or many steps of one
group."""
TOLD = 3
"""Collectives that a message tells of."""
SAME_SIZE = ("all_reduce", "allreduce", "broadcast")
"""Operations to which all ranks bring tensors of one size."""


@dataclass(frozen=True)
class Call:
    """One collective as one rank called it."""

    number: int
    """Of the calls of its group on this rank, from 1 on."""
    what: str
    """E.g. all_reduce of float [1000]."""
    ended: bool
    time: float
    """Unix time of the call, seconds."""

    @property
    def operation(self) -> str:
        return self.what.split(" ")[0]


@dataclass(frozen=True)
class Group:
    """A process group as one rank knows it."""

    name: str
    """torch's; the same on every rank."""
    about: str
    """What it is for, as the code that made it says; empty if it does not."""
    ranks: list[int]
    """Written by the first two of them alone: thousands of ranks would write each as many numbers."""
    calls: list[Call]
    """The newest, oldest first."""


def record(hang: Path, rank: int) -> None:
    """Writes what is recorded of this rank into the folder. Raises OSError."""
    groups = recorded()
    if groups:
        write(hang, rank, groups)


def write(hang: Path, rank: int, groups: list[Group]) -> None:
    """Raises OSError."""
    tree = [
        {
            **vars(group),
            "ranks": group.ranks if rank in group.ranks[:2] else [],
            "calls": [vars(call) for call in group.calls],
        }
        for group in groups
    ]
    write_json(hang / f"rank-{rank:05d}{SUFFIX}", tree)


def recorded() -> list[Group]:
    """The groups in which this process has called collectives; empty where torch records none."""
    calls: dict[str, dict[int, Call]] = defaultdict(dict)
    for name in DUMPS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        # A recorder without calls has no key: gloo's where only NCCL was used, NCCL's of a run on CPUs.
        for entry in json.loads(dump()).get("entries", ()) if dump is not None else ():
            if not entry["is_p2p"]:
                call = _call(entry)
                calls[entry["process_group"][0]][call.number] = call
    known = {str(name): group for group, name in _world.pg_names.items()}
    return [
        Group(
            name,
            _about(known[name]),
            dist.get_process_group_ranks(known[name]),
            [of_group[number] for number in sorted(of_group)[-NEWEST:]],
        )
        for name, of_group in calls.items()
        if name in known
    ]


def _call(entry: dict[str, Any]) -> Call:
    tensors = [
        f"{kind.lower()} {size}" for kind, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    ]
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    what = entry["profiling_name"].rpartition(":")[2] + (f" of {tensors[0]}{more}" if tensors else "")
    ended = entry["retired"] or entry["state"] == "completed"
    return Call(entry["collective_seq_id"], what, ended, entry["time_created_ns"] / 1e9)


def _about(group: Any) -> str:
    about = getattr(group, "group_desc", "")
    return "" if about in ("undefined", "default_pg") else str(about).removesuffix("_GROUP").replace("_", " ").lower()


def read(hang: Path) -> dict[int, list[Group]]:
    """What ranks have written, by rank."""
    found = {}
    for path in hang.glob(f"rank-*{SUFFIX}"):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            found[int(path.stem.removeprefix("rank-"))] = [
                Group(**{**group, "calls": [Call(**call) for call in group["calls"]]}) for group in tree
            ]
        except (OSError, ValueError, KeyError, TypeError):  # it could not be written whole
            continue
    return found


def explain(ranks: dict[int, list[Group]]) -> list[str]:
    """A sentence for each collective that holds ranks up, at most TOLD of them, the first that was called first; those
    that some ranks did not call before those of which a record is missing, and these before those that all called."""
    found = []
    by_name: dict[str, dict[int, Group]] = defaultdict(dict)
    for rank, groups in ranks.items():
        for group in groups:
            by_name[group.name][rank] = group
    for told in by_name.values():
        one = max(told.values(), key=lambda group: len(group.ranks))
        members = one.ranks or sorted(told)
        # A member that has a record, though not of this group, has called nothing in it.
        calls = {rank: told[rank].calls if rank in told else [] for rank in members if rank in ranks}
        number = min((call.number for of_rank in calls.values() for call in of_rank if not call.ended), default=None)
        if number is not None:
            found.append(_sentence(number, one.about, members, calls))
    return [sentence for _, _, sentence in sorted(found)[:TOLD]]


def _sentence(number: int, about: str, members: list[int], calls: dict[int, list[Call]]) -> tuple[int, float, str]:
    """Of call `number` of the group of `members`, which has not ended on every rank: 0 if some did not call it or
    called another, 1 if records are missing, else 2; when it was first called; and the sentence. `calls`: of each rank
    that has a record."""
    there = {rank: call for rank, of_rank in calls.items() for call in of_rank if call.number == number}
    # The record of a rank that is far ahead no longer has the call.
    ahead = [r for r, of_rank in calls.items() if r not in there and of_rank and of_rank[0].number > number]
    missing = [rank for rank in calls if rank not in there and rank not in ahead]
    first = min(there.values(), key=lambda call: call.time)
    of = f"the group of {ranks_text(members)}" + (f" ({about})" if about else "")
    same_size = first.operation in SAME_SIZE
    kinds = {rank: call.what if same_size else call.operation for rank, call in there.items()}
    if len(set(kinds.values())) > 1:
        each = (f"{kind} on {ranks_text(r for r in kinds if kinds[r] == kind)}" for kind in sorted(set(kinds.values())))
        return 0, first.time, f"call {number} of {of} is not the same everywhere: {'; '.join(each)}"
    text = f"{first.what}, call {number} of {of}"
    if missing:
        return 0, first.time, f"{text}: {ranks_text(missing)} did not call it, {ranks_text(there)} did"
    unknown = [rank for rank in members if rank not in calls]
    if unknown:
        return 1, first.time, f"{text}: {ranks_text(calls)} called it, of {ranks_text(unknown)} there is no record"
    return 2, first.time, f"{text}: all its ranks called it, and it does not end"
