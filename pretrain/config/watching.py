"""How a run is watched: what counts as a fault and what follows, what is logged, shown and told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.json_config import Section
from model.config import PositiveInt
from pretrain.config.alert_kinds import DEFAULT_ALERTS, AlertCommand, AlertKind
from pretrain.config.fields import FREE, NonNegativeInt


class ResilienceConfig(Section):
    """What a run does about faults."""

    hang_timeout_seconds: Annotated[float, Field(ge=0.0, le=7 * 86400.0)] = Field(540.0, json_schema_extra=FREE)
    """A rank that is in the same phase of a step (or of start-up, validation, checkpoint) for this many seconds has
    hung: the run names the ranks that did not arrive, writes all stacks to RUN_DIR/hang and ends with code 5. Set it
    longer than the longest phase; NCCL's own limits follow it. At least 1, at most a week; 0: off."""
    step_timeout_factor: Annotated[float, Field(ge=0.0, le=1e6)] = Field(10.0, json_schema_extra=FREE)
    """A shorter limit for forward pass, backward pass, update and sums of a step: this many times the longest of the
    last 100 steps, at least 120 s, at most hang_timeout_seconds. Only hang_timeout_seconds holds in the first 15 steps
    of a start, while batches are awaited, and in validation and checkpoint. At least 2; 0: off."""
    max_skipped_updates: PositiveInt = Field(10, json_schema_extra=FREE)
    """An update whose loss or gradient is not finite is skipped on all ranks; after this many in a row the run ends
    with code 3. (Overflows that fp16 loss scaling handles do not count.)"""
    spike_threshold: Annotated[float, Field(ge=0.0)] = Field(10.0, json_schema_extra=FREE)
    """A loss is a spike if it exceeds the median of the last spike_window_steps losses by more than this many of their
    standard deviations (1.4826 x median absolute deviation, at least 1% of the median). 0: off."""
    spike_window_steps: Annotated[int, Field(ge=8, lt=2**31)] = Field(128, json_schema_extra=FREE)
    """Number of earlier steps that a loss is compared with; no loss is a spike before a quarter of them."""
    spike_action: Literal["warn", "rollback"] = Field("warn", json_schema_extra=FREE)
    """warn: a line and an event. rollback: also continue from the newest checkpoint before the data that caused it, and
    never read that data. That changes the course of the run, so it is not the default."""
    spike_skip_steps: PositiveInt = Field(4, json_schema_extra=FREE)
    """With spike_action = rollback: number of steps whose data are left out, the spike's own and those before it, none
    from before a change of the mixture."""
    replica_check_every_steps: NonNegativeInt = Field(1000, json_schema_extra=FREE)
    """Steps between comparisons of the weights that several ranks hold (a checksum of each parameter; one more before
    every checkpoint), against silent corruption. Under ZeRO 3 only routing statistics and the small parameters that it
    keeps whole have replicas. 0: off."""
    replica_action: Literal["stop", "rollback"] = Field("stop", json_schema_extra=FREE)
    """If replicas differ. stop: end with code 4. rollback: continue from the newest checkpoint."""
    max_rollbacks: NonNegativeInt = Field(3, json_schema_extra=FREE)
    """Rollbacks allowed in the life of a run folder; one more ends the run: code 3 after a spike, 4 if replicas
    differ."""


class MonitorConfig(Section):
    """What is written while training."""

    print_every_steps: PositiveInt = Field(10, json_schema_extra=FREE)
    """Steps between lines on the terminal, whose values are means of these steps; metrics.jsonl gets every step."""
    tensorboard: bool = Field(True, json_schema_extra=FREE)
    """Write curves, pictures and texts for TensorBoard to RUN_DIR/tensorboard."""
    tensorboard_every_steps: PositiveInt = Field(1, json_schema_extra=FREE)
    """Steps between the points of curves."""
    wandb: Literal["off", "online", "offline"] = Field("off", json_schema_extra=FREE)
    """Send the same to Weights & Biases (pip install -e ".[wandb]"), as one run for all starts of a run folder. online:
    needs `wandb login` or WANDB_API_KEY. offline: write it to RUN_DIR/wandb, for `wandb sync`. The run goes on if W&B
    does not answer."""
    wandb_project: Annotated[str, Field(min_length=1)] = Field("switchall", json_schema_extra=FREE)
    """Project of Weights & Biases; the run's name there is its folder's."""
    wandb_entity: str | None = Field(None, json_schema_extra=FREE)
    """User or team of Weights & Biases; null: that of the key."""
    details_every_steps: NonNegativeInt = Field(100, json_schema_extra=FREE)
    """Steps between what costs time: norms of gradients, parameters and updates by group of parameters, histograms of
    selection scores, pictures of the experts' load. The first step has them too. Then the ranks are compared as well,
    to find slow ones. 0: never."""
    peak_flops: Annotated[float, Field(gt=0.0)] | None = Field(None, json_schema_extra=FREE)
    """FLOP/s of one device at its best, which `flops_utilization` is a share of. null: by the maker's data sheet for a
    known GPU in bf16 or fp16; on a CPU a matrix product measures it after the first step, in 0.15 s."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(None, json_schema_extra=FREE)
    """First and last step whose operators and kernels are recorded in RUN_DIR/profile: a table of the costliest and a
    trace, of the ranks of the first data-parallel slice. Take steps after the first ten, and few: three of a large
    model are a hundred megabytes."""
    memory_history: bool = Field(False, json_schema_extra=FREE)
    """On a GPU: note the Python stack of each allocation from the start on, so that the snapshot of a GPU whose memory
    is full says which lines hold it. Costs microseconds an allocation, and memory of the host. A CPU has no such
    snapshot."""
    collapse_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.95, json_schema_extra=FREE)
    """A router counts as collapsed in a step if the k busiest of its E experts get more than this share of its choices
    (a token chooses k). An even router has k / E; a router whose k / E is at least this share is not watched."""
    collapse_after_steps: NonNegativeInt = Field(200, json_schema_extra=FREE)
    """A router that was collapsed for this many steps in a row is reported by a line and an event, and again after
    twice, four times, ... as many. 0: never."""
    alert_command: AlertCommand | None = Field(None, json_schema_extra=FREE)
    """Command that tells you what happens to the run, split into words as by a shell, without a shell. Rank 0 starts it
    for every event of `alerts`, with a sentence as its last argument and JSON on stdin, and never waits for it
    (docs/monitoring.md). It is saved as given: keep a password in a file or an environment variable. null: none."""
    alerts: tuple[AlertKind, ...] = Field(DEFAULT_ALERTS, json_schema_extra=FREE)
    """Events that alert_command is started for."""
    alert_minutes: Annotated[float, Field(ge=0.0)] = Field(30.0, json_schema_extra=FREE)
    """Between two alerts of the same kind at least; how many were left out is said in the next one. 0: none is left
    out, but while the command still runs for that kind."""
