"""What belongs to a router apart from its selection: load statistics, the entropy regularisers, and the recording of
choices.

The selection itself is model/kernels/ops/route.py.

Tensor shapes: N tokens, H heads, E experts; B sequences, L tokens of a sequence, k choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.ops.elementwise import entropy, linear_entropy
from model.parallel.collectives import leave_shards, sum_for_each
from model.parallel.context import ParallelContext


@dataclass(frozen=True)
class Place:
    """Which part of a router's choices of a step a forward pass makes."""

    sequence_index: Tensor
    """[B] int64: position of each sequence in the run."""
    heads: slice
    """This rank's heads, among all heads."""
    first_token: int
    """Position of the first token in its sequence."""


class Choices(Protocol):
    """Called by a router once it has chosen; attached to its `RoutingStatistics`."""

    replaces: bool
    """Whether the answer may be another choice than the router's own."""

    def settle(self, own: Tensor, logits: Tensor, place: Place, *, is_repeated: bool) -> Tensor:
        """`own` [B, L, H, k] int64, best first, of `logits` [B, L, H, E] -> the choice that counts, of the same shape.
        `is_repeated`: a forward pass is computed again (model/recompute.py) and gets the same answer."""


class Counts:
    """What a router counts, all fp64: exact beyond 2^24 tokens. Routers of one kind that are kept together have a
    leading dimension R (model/routing_table.py).

    Sums since the last step: `load` [E] or [H, E], how often each expert was chosen; `num_tokens` [], `probability_sum`
    [E] of softmax(logits) and `gate_sum` [E] of the chosen gates, only where a regulariser needs them.
    Means of the previous global batch, part of the training state, uniform before the first: `probability` [E] (entropy
    regulariser); `choice_share` [E], the share of choices, and `gate_mean` [E] per token (MoA). What is not tracked has
    size 0.
    """

    load: Tensor
    num_tokens: Tensor
    probability_sum: Tensor
    gate_sum: Tensor
    probability: Tensor
    choice_share: Tensor
    gate_mean: Tensor

    def accumulators(self) -> list[Tensor]:
        """The tensors to be summed over data-parallel ranks at the end of a step, in a fixed order."""
        return [self.load, self.probability_sum, self.gate_sum, self.num_tokens]

    @torch.no_grad()
    def update_means(self, keep: Tensor | None = None) -> None:
        """Called after the sum over ranks: the step's means become those of the previous batch. `keep`, a bool scalar
        on the same device, says whether to: a skipped step's are dropped. A step that counted nothing keeps the old
        ones. Waits for no device."""
        per_token = self.num_tokens[..., None]
        of_choices = self.load.sum(-1, keepdim=True) if self.gate_sum.numel() else per_token
        for mean, total, count in (
            (self.probability, self.probability_sum, per_token),
            (self.choice_share, self.load, of_choices),
            (self.gate_mean, self.gate_sum, per_token),
        ):
            if mean.numel():
                has_new = count > 0 if keep is None else (count > 0) & keep
                mean.copy_(torch.where(has_new, total / count.clamp_min(1.0), mean))


class Entry(NamedTuple):
    """What one forward pass adds to the sums of a router."""

    heads: slice
    load: Tensor
    """Int64 counts of these heads."""
    probability: Tensor | None
    """[E] fp64, summed over tokens."""
    gates: Tensor | None
    """[E] fp64, summed over tokens."""
    num_tokens: int


class RoutingStatistics(Counts):
    """Counts of one router on its device; not module buffers, so that a cast of the module to bf16 cannot touch them.

    A forward pass leaves an entry; `add_up` adds those of all routers of a model at once, and so does a look at a sum.
    `state` is checkpointed: `probability` with `tracks_probability`, `choice_share` and `gate_mean` with
    `tracks_balance`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        tracks_probability: bool,
        tracks_balance: bool = False,
        is_sharded: bool = False,
    ) -> None:
        assert len(shape) == 1 or not (tracks_probability or tracks_balance), "means are of routers without heads"
        self.shape = shape
        self.is_sharded = is_sharded
        """Each tensor-parallel rank counts its own heads, or tokens; a step's sums are also over those ranks."""
        self.is_paused = False
        """While this is set nothing is counted, because a forward pass is being repeated (model/recompute.py)."""
        self.choices: Choices | None = None
        """Records the router's choices in training, or replaces them; None: neither."""
        self.choices_in_use: Choices | None = None
        """The same of a model that is not in training."""
        self.tracks_probability = tracks_probability
        self.tracks_balance = tracks_balance
        self.waiting: list[Entry] = []
        """Entries that are not yet added."""
        probability_shape, balance_shape = (
            shape if tracks else (0,) for tracks in (tracks_probability, tracks_balance)
        )
        self._load = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self._num_tokens = torch.zeros((), dtype=torch.float64, device="cpu")
        self._probability_sum = torch.zeros(probability_shape, dtype=torch.float64, device="cpu")
        self._gate_sum = torch.zeros(balance_shape, dtype=torch.float64, device="cpu")
        self.probability = torch.full_like(self._probability_sum, 1.0 / shape[-1])
        self.choice_share = torch.full_like(self._gate_sum, 1.0 / shape[-1])
        self.gate_mean = torch.full_like(self._gate_sum, 1.0 / shape[-1])

    @property
    def load(self) -> Tensor:  # type: ignore[override]
        add_up([self])
        return self._load

    @property
    def num_tokens(self) -> Tensor:  # type: ignore[override]
        add_up([self])
        return self._num_tokens

    @property
    def probability_sum(self) -> Tensor:  # type: ignore[override]
        add_up([self])
        return self._probability_sum

    @property
    def gate_sum(self) -> Tensor:  # type: ignore[override]
        add_up([self])
        return self._gate_sum

    def to(self, device: torch.device) -> None:
        """Moves all tensors to `device` (the engine moves only parameters and buffers)."""
        add_up([self])
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def become(self, part: Counts) -> None:
        """From now on the counts are kept in the tensors of `part`, which get the present values."""
        for own, kept in zip(self.accumulators(), part.accumulators(), strict=True):
            kept.copy_(own)
        self._load, self._probability_sum, self._gate_sum, self._num_tokens = part.accumulators()
        for name in ("probability", "choice_share", "gate_mean"):
            kept = getattr(part, name)
            kept.copy_(getattr(self, name))
            setattr(self, name, kept)

    @torch.no_grad()
    def record(
        self,
        load: Tensor,
        logits: Tensor | None,
        gates: Tensor | None = None,
        index: Tensor | None = None,
        *,
        heads: slice = slice(None),
        probability: Tensor | None = None,
    ) -> None:
        """Leaves the entry of one forward pass: `load` of shape `shape` (or of its `heads`); where p or balance is
        tracked the clean logits [N, E]; for balance also `gates` and `index` [N, k] of the chosen experts.
        `probability` [E] fp64: the sums of softmax(logits) over tokens, where they are known."""
        if self.is_paused:
            return
        chosen = None
        if not self.tracks_probability:
            probability = None
        elif probability is None:
            assert logits is not None
            probability = logits.softmax(-1).sum(0, dtype=torch.float64)
        if self.tracks_balance:
            assert gates is not None and index is not None
            chosen = chosen_gates(gates, index, self.shape[-1]).sum(0, dtype=torch.float64)
        self.waiting.append(Entry(heads, load, probability, chosen, 0 if logits is None else logits.shape[0]))

    def totals(self, entry: Entry) -> list[Tensor]:
        """Where `entry` belongs: its load, probability, gates and number of tokens."""
        return [self._load[entry.heads], self._probability_sum, self._gate_sum, self._num_tokens]

    def state(self) -> dict[str, Tensor]:
        """The training state by name, to be saved and to be copied into."""
        balance = {"choice_share": self.choice_share, "gate_mean": self.gate_mean} if self.tracks_balance else {}
        return {"probability": self.probability, **balance}

    def finish_step(self, keep: Tensor | None = None) -> None:
        """Ends the step of this router alone: new means (see `update_means`), counts cleared."""
        self.update_means(keep)
        for tensor in self.accumulators():
            tensor.zero_()


@torch.no_grad()
def add_up(routers: Iterable[RoutingStatistics]) -> None:
    """Adds the entries that wait in `routers`, in the order in which each router left them, by a few launches for all
    routers together."""
    waiting = [router for router in routers if router.waiting]
    while waiting:  # one entry of each router at a time: what is added at once must not overlap
        entries = [(router, router.waiting.pop(0)) for router in waiting]
        pairs = [(router.totals(entry), entry) for router, entry in entries]
        counts = torch.cat([entry.load.reshape(-1) for _, entry in pairs]).double()
        parts = counts.split([entry.load.numel() for _, entry in pairs])
        torch._foreach_add_(  # RELIES-ON torch-foreach
            [totals[0] for totals, _ in pairs],
            [part.view_as(entry.load) for part, (_, entry) in zip(parts, pairs, strict=True)],
        )
        sums = [
            (total, value)
            for totals, entry in pairs
            for total, value in zip(totals[1:3], (entry.probability, entry.gates), strict=True)
            if value is not None
        ]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [value for _, value in sums])
        counted = [(totals[3], float(entry.num_tokens)) for totals, entry in pairs if entry.num_tokens]
        if counted:
            numbers: list[int | float | complex] = [number for _, number in counted]
            torch._foreach_add_([total for total, _ in counted], numbers)
        waiting = [router for router in waiting if router.waiting]


def chosen_gates(gates: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """`gates` [N, k] at their experts `index` [N, k] of [N, E], 0 elsewhere. Sums of it over tokens are repeatable."""
    return gates.new_zeros(gates.shape[0], num_experts).scatter(1, index, gates)


class Regularised(Protocol):
    """The keys of a layer's section that `entropy_regularizer` reads."""

    @property
    def entropy_weight(self) -> float:
        """gamma."""

    @property
    def entropy_scope(self) -> Literal["global_batch", "micro_batch"]:
        """Batch whose mean p it uses."""


def entropy_regularizer(
    logits: Tensor,
    config: Regularised,
    statistics: RoutingStatistics,
    parallel: ParallelContext,
    *,
    token_group: dist.ProcessGroup | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """gamma * sum_e p_e log p_e, to be added to the loss (sigma-MoE eq. 21): minimal for a uniform p. Scalar, fp32. And
    the sums of softmax(logits) over the tokens for `statistics`, [E] fp64, where they were found on the way.

    `logits` [N, E] before expert dropout. Scope `micro_batch`: p is the mean of softmax(logits) over the N tokens of
    every data-parallel rank, reduced by a collective that autograd knows. Scope `global_batch`: the coefficient
    log p, p of the previous step, multiplies this micro-step's mean: the gradient of the true term linearised
    at that p, and no communication. Data-parallel gradients are averages over ranks, so is this term.

    If the ranks of `token_group` route different tokens of the same sequences, means are also over these ranks. The
    value is the same on each of them; the gradient is that of the rank's own tokens and must be summed with the
    others'.

    `backend`, a resolved one of `elementwise`, computes the scope `global_batch` without a `token_group`.
    """
    if config.entropy_scope == "global_batch" and token_group is None:
        return entropy(logits, statistics.probability, config.entropy_weight, backend=backend)
    log_share = logits.log_softmax(-1)
    if config.entropy_scope == "global_batch":
        share = _mean_over(token_group, log_share.exp().mean(0))
        return linear_entropy(share, statistics.probability, config.entropy_weight), None
    # log p is computed in the log domain, because the log has no gradient if all probabilities underflow. The maximum
    # over the tokens of all ranks is subtracted first, detached.
    maximum = log_share.detach().amax(0)
    if parallel.data_size > 1:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=parallel.data_group)
    if token_group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=token_group)
    scaled = _mean_over(token_group, (log_share - maximum).exp().mean(0))
    if parallel.data_size > 1:
        scaled = sum_for_each(scaled, parallel.data_group) / parallel.data_size
    log_probability = scaled.log() + maximum
    return config.entropy_weight * (log_probability.exp() * log_probability).sum(), None


def entropy_of_sequences(logits: Tensor) -> Tensor:
    """sum_e p_e log p_e, summed over sequences and heads, of `logits` [B, T, H, E] before expert dropout. Scalar, fp32.
    p is the mean of softmax(logits) over the T tokens of one sequence, for each head: the regulariser of MoEUT's
    SwitchHead (arXiv 2405.16039 and its authors' library). A sequence is whole wherever a head of it is, so layouts and
    micro-batches change nothing, and nothing is kept of the step before."""
    # In the log domain, because the log has no gradient if all probabilities underflow.
    log_probability = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return (log_probability.exp() * log_probability).sum()


def _mean_over(group: dist.ProcessGroup | None, value: Tensor) -> Tensor:
    """The mean over `group`; a rank's gradient is that of its own share."""
    return value if group is None else leave_shards(value / group.size(), group)


def negative_entropy(probability: Tensor) -> Tensor:
    """sum_e p_e log p_e over the last axis, 0 log 0 = 0: what the regulariser measures. From -log E to 0."""
    return torch.xlogy(probability, probability).sum(-1)
