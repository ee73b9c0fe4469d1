"""A training step of a planned run, rehearsed: what a rank holds at its highest point, and whether the ranks of each
group call the same collectives. This process plays a few ranks, one after the other, on tensors without data.

What imports torch is imported inside functions: programs that check a run's settings alone say sooner what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.errors import ConfigError, UserError
from common.units import GIB
from pretrain.planning.stops import CannotRehearse, told
from pretrain.preflight.checklist import Blocked, Checklist, Outcome
from pretrain.preflight.run import PlannedRun

if TYPE_CHECKING:
    from pretrain.planning.record import Rehearsal, Routed

MOST_BLOCKS = 3
"""Of a rehearsed model without pipeline stages. With three, the highest point lies where it lies with many."""
NEEDED = ("configuration", "rules", "layout", "device", "optimizer")
"""Checks that must have passed: the step of another run is no answer, such as of one without a key that is unknown."""
SPLITS: dict[Routed, str] = {
    "even": "tokens evenly split over experts",
    "worst": "as many tokens as possible sent to one rank's experts",
}


class StepRehearsal:
    """Of a planned run. A rank is rehearsed once for each number of blocks."""

    def __init__(self, run: PlannedRun, rank: int | None = None, device_memory: int | None = None) -> None:
        """`rank`: is rehearsed beside those that stand for all. `device_memory`: bytes of a rank's device; None: those
        of the GPU that is here, if the run is for GPUs."""
        self._run, self._rank, self._device_memory = run, rank, device_memory
        self._found: dict[tuple[int, int, Routed], Rehearsal] = {}
        """By blocks, rank and split of tokens."""

    def check(self, checks: Checklist) -> None:
        """Makes two checks, collectives and memory."""
        failed = next((o.name for o in checks.outcomes if o.name in NEEDED and not o.passed), None)
        checks.do("collectives", lambda found: self._warned(found, lambda: self._collectives(found, failed)))
        checks.do("memory", lambda found: self._warned(found, lambda: self._memory(found, failed)))

    def _warned(self, found: Outcome, check: Callable[[], str]) -> str:
        """Makes a check. What a rehearsal cannot do is no fault of the run, but nobody may think it was checked."""
        try:
            return check()
        except CannotRehearse as error:
            found.warnings.append(f"{found.name}: not checked; {error}")
            raise Blocked(str(error)) from error

    def _memory(self, found: Outcome, failed: str | None) -> str:
        from pretrain.report.memory_text import copy_text

        self._need(failed)
        ends, said, most, many = self._ends(), [], 0, len(self._routings()) > 1
        copy = self._copy()
        for routed in self._routings():
            peak, rank = max((self._peak(rank, routed), rank) for rank in ends)
            said.append(f"{peak / GIB:.2f} GiB on rank {rank:,}" + f", {SPLITS[routed]}" * many)
            most = max(most, peak + copy)
        how = ", as many blocks add what the third one adds" if self._is_extrapolated else ""
        graphs = ""
        if (with_graphs := self._with_graphs()) is not None:
            most = max(most, with_graphs)
            words = "with what CUDA graphs keep (train.cuda_graph), which plan.py fit adds up"
            graphs = f"; {with_graphs / GIB:.2f} GiB {words}"
        return (
            f"at the highest point of a step {'; '.join(said)} (rehearsed: rank {_listed(ends)}{how}){copy_text(copy)}"
            f"{graphs}"
            f"{self._compared(found, most)}"
        )

    def _compared(self, found: Outcome, needed: int) -> str:
        """What a rank's device has. An estimate may err to both sides: one that does not fit is a warning."""
        from pretrain.gpus import gpu_memory
        from pretrain.planning.memory import USABLE

        has, whose, other = self._device_memory, "the device", ""
        if has is None and self._run.device == "cuda":  # often that of a login node
            has, whose, other = gpu_memory(), "this machine's GPU", "; --device-memory GIB is another's"
        if has is None:
            return ""
        share = f"{USABLE:.0%} of {has / GIB:.1f}{other}"
        text = f"an estimate may fill {USABLE * has / GIB:.2f} GiB of {whose} ({share})"
        if needed > USABLE * has:
            found.warnings.append(
                f"memory: a step needs about {needed / GIB:.2f} GiB, and {text}: lower batch.micro_sequences, set "
                f"train.recompute or divide the model (plan.py fit names one change)"
            )
        return f"; {text}"

    def _copy(self) -> int:
        """Bytes that a rank on a CPU keeps for its checkpoints besides, on the stage with most."""
        from pretrain.planning.layout_plan import copy_beside_a_step

        run = self._run
        stages = range(run.config.parallel.pipeline)
        return max(copy_beside_a_step(run.config, run.world_size, stage, run.device) for stage in stages)

    def _with_graphs(self) -> int | None:
        """Bytes with what CUDA graphs keep, which no rehearsal records; None where there are none."""
        from pretrain.config.graph_rules import takes_graphs
        from pretrain.planning.memory import estimate, why_unknown

        config, size, kind = self._run.config, self._data_size, self._run.device
        if why_unknown(config) is not None or not takes_graphs(config, data_size=size, device_type=kind):
            return None
        return estimate(config, size, kind).total

    def _ends(self) -> list[int]:
        """Of a pipeline: the first stage keeps the activations of most micro-steps, the last has the output layer."""
        from pretrain.planning.gradients import fullest_rank

        config = self._run.config
        stages = (0, config.parallel.pipeline - 1)
        ends = dict.fromkeys(fullest_rank(config, self._data_size, stage) for stage in stages)
        if self._rank is not None and self._rank < self._run.world_size:
            ends.setdefault(self._rank)
        return list(ends)

    @property
    def _is_extrapolated(self) -> bool:
        """A whole model of many blocks is not rehearsed: a thousand ranks take DeepSpeed a minute."""
        config = self._run.config
        return config.parallel.pipeline == 1 and config.model.num_layers > MOST_BLOCKS

    def _peak(self, rank: int, routed: Routed) -> int:
        """Bytes of a rank at the highest point of a step."""
        layers = self._run.config.model.num_layers
        if not self._is_extrapolated:
            return self._rehearsed(layers, rank, routed).peak
        fewer, most = (self._rehearsed(blocks, rank, routed).peak for blocks in (MOST_BLOCKS - 1, MOST_BLOCKS))
        return most + (layers - MOST_BLOCKS) * (most - fewer)

    def _collectives(self, found: Outcome, failed: str | None) -> str:
        """Of a model with fewer blocks: they are all alike."""
        self._need(failed)
        from pretrain.planning.same_calls import first_difference, representatives

        config, parallel = self._run.config, self._run.config.parallel
        blocks = min(config.model.num_layers, parallel.pipeline if parallel.pipeline > 1 else MOST_BLOCKS - 1)
        ranks = representatives(config.replaced("model", num_layers=blocks), self._data_size)
        if self._rank is not None:
            ranks.setdefault(self._rank, "--rank")
        for routed in self._routings():
            calls = {rank: self._rehearsed(blocks, rank, routed).calls for rank in ranks}
            difference = first_difference(calls, is_even=routed == "even")
            if difference is not None:
                found.problem(
                    ConfigError(
                        f"{self._key(difference.group)}: {difference}: they would wait for each other for ever; let "
                        f"the layer, or the setting, that makes the difference do the same on all of them"
                    )
                )
            refused = next((call for made in calls.values() for call in made if call.refused), None)
            if refused is not None and self._run.device == "cuda":
                found.problem(
                    ConfigError(
                        f"{self._key(refused.ranks)}: {refused.kind} of {refused.elements:,} {refused.dtype}: "
                        f"{refused.refused}, which NCCL does not take between GPUs; let the layer that calls it give a "
                        f"contiguous tensor of a dtype that NCCL has"
                    )
                )
        who = ", ".join(f"{rank:,} ({why})" for rank, why in ranks.items())
        stand = "stands" if len(ranks) == 1 else "stand"
        both = ", at the even and at the worst split of tokens over experts" if parallel.expert > 1 else ""
        return (
            f"every group has the same calls in the same order, by rank {who}, which {stand} for all, with {blocks} of "
            f"the {config.model.num_layers} blocks{both}"
        )

    def _need(self, failed: str | None) -> None:
        if failed is not None:
            raise Blocked(f"{failed} has a fault")
        if self._rank is not None and self._rank >= self._run.world_size:
            last = self._run.world_size - 1
            raise UserError(f"--rank: is {self._rank}, but the run has the ranks 0 to {last}; name one of them")

    @property
    def _data_size(self) -> int:
        assert self._run.data_size is not None
        return self._run.data_size

    def _routings(self) -> tuple[Routed, ...]:
        """How tokens are split over the ranks of an expert group."""
        return ("even", "worst") if self._run.config.parallel.expert > 1 else ("even",)

    def _rehearsed(self, blocks: int, rank: int, routed: Routed) -> Rehearsal:
        """A step of `rank` in a model of so many blocks. Raises StepStops or CannotRehearse where there is none."""
        key = blocks, rank, routed
        if key not in self._found:
            run, config = self._run, self._run.config.replaced("model", num_layers=blocks)
            with told():
                from pretrain.planning.rehearsal import rehearse  # imports DeepSpeed

                self._found[key] = rehearse(config, run.world_size, rank, run.device, routed=routed)
        return self._found[key]

    def _key(self, group: tuple[int, ...]) -> str:
        """The setting that divides the run into such groups."""
        from pretrain.parallel.layout import group_ranks

        for name, groups in group_ranks(self._run.config, self._data_size).items():
            if name != "data" and any(set(group) <= set(row) for row in groups.tolist()):
                return f"parallel.{name}"
        return "parallel"


def _listed(ranks: list[int]) -> str:
    return " and ".join(f"{rank:,}" for rank in ranks)
