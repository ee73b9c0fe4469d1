"""What a rank sends in a step, to the byte: the collectives of a rehearsed step, with those micro-steps that were not
rehearsed because they repeat another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pretrain.config.schema import Config
from pretrain.planning import layout_plan
from pretrain.planning.links import Collective, groups_of_ranks
from pretrain.planning.record import Call
from pretrain.planning.same_calls import MESSAGE

Kinds = Counter[tuple[str, str, int, int, str]]
"""(kind, group, ranks, bytes, part) -> how many equal calls."""


def rehearsed_collectives(config: Config, num_ranks: int, stage: int, device_type: str) -> list[Collective]:
    """Of the first rank of a pipeline stage in an optimizer step, in no order; equal ones as one. Where experts are
    divided, tokens are split evenly."""
    parallel = config.parallel
    rank, whole = stage * num_ranks // parallel.pipeline, config.micro_steps(config.data_size(num_ranks))
    step = layout_plan.rehearsed(config, num_ranks, rank, device_type)
    names = _Names(config, num_ranks, rank)
    found, repeats = names.counted(step.calls), whole - step.micro_steps
    if repeats:
        if parallel.pipeline > 1:
            longer = layout_plan.rehearsed(config, num_ranks, rank, device_type, step.micro_steps + 1)
            one = names.counted(longer.calls) - found
        else:
            # The last one may send gradients too; every other one is as the first.
            one = names.counted(step.calls[step.starts[0] : step.starts[1]])
        found.update({call: repeats * count for call, count in one.items()})
    return [Collective(*call, count) for call, count in found.items()]


class _Names:
    """What the groups are called that a rank is in."""

    def __init__(self, config: Config, num_ranks: int, rank: int) -> None:
        self._named: dict[tuple[int, ...], str] = {}
        for name, rows in groups_of_ranks(config, config.data_size(num_ranks)).items():
            for row in rows.tolist():
                if rank in row and len(row) > 1:
                    self._named.setdefault(tuple(sorted(row)), name)

    def counted(self, calls: Iterable[Call]) -> Kinds:
        found: Kinds = Counter()
        for call in calls:
            if len(call.ranks) == 1:
                continue  # nothing is sent
            name = "pipeline" if call.kind in MESSAGE else self._named[tuple(sorted(call.ranks))]
            found[call.kind, name, len(call.ranks), call.num_bytes, call.part] += 1
        return found
