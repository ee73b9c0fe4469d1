"""Where a run stands in its data: the stages that it has read, by its checkpoint and what it reads now, and how far."""

from __future__ import annotations

from dataclasses import replace

from common.errors import ConfigError
from model.costs import training_flops_per_token
from pretrain.checkpoint import Checkpoint
from pretrain.config.data_rules import folder_name, whole_weights
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config
from pretrain.config.validated import setting
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.stages import Stage, first_stage


def stages_of(checkpoint: Checkpoint | None, sources: Sources, config: Config) -> tuple[Stage, ...]:
    """The stages of a run of `config` that reads `sources` from its beginning, or from `checkpoint` on. If the
    checkpoint's run read others, with other weights or in windows of another length, a new stage begins there. Streams
    stay those into which its text was cut."""
    now = sources.stage()
    if checkpoint is None:
        return (now,)
    progress, is_unchanged = checkpoint.progress, checkpoint.state["manifest_digest"] == sources.digest
    stages = progress.stages or ((now,) if is_unchanged else (_unrecorded_stage(checkpoint),))
    if (streams := _streams_of(checkpoint, stages[-1], config)) is not None:
        stages = (*stages[:-1], replace(stages[-1], streams=streams))
    before, length = sequence_length_of(checkpoint), config.model.sequence_length
    if before == length:
        return stages if is_unchanged else (*stages, stages[-1].followed_by(progress.position, now.sources))
    followed = stages[-1].followed_by(progress.position, now.sources)
    return (*stages, followed.in_windows_of(length, before=before))


def _streams_of(checkpoint: Checkpoint, stage: Stage, config: Config) -> int | None:
    """Into how many streams the text was cut that a run without memory goes on reading in them, where those are not
    `batch.global_sequences`."""
    saved = checkpoint.state["config"]
    if not config.reads_streams or config.model.memory_length or setting(saved, "data.order") != "streams":
        return None
    streams = stage.streams or setting(saved, "batch.global_sequences")
    return streams if streams != config.batch.global_sequences else None


def sequence_length_of(checkpoint: Checkpoint) -> int:
    """Tokens in a sequence of the run that saved it."""
    length: int = checkpoint.state["config"]["model"]["sequence_length"]
    return length


def _unrecorded_stage(checkpoint: Checkpoint) -> Stage:
    """The only stage of a checkpoint from before stages were recorded, by the configuration in it."""
    data = checkpoint.state["config"]["data"]
    rows = data.get("sources") or [{"manifest": data["manifest"], "weight": 1}]
    names = [row.get("name") or folder_name(row["manifest"]) for row in rows]
    # Of several sources the checkpoint has one digest, of all of them.
    digests = [checkpoint.state["manifest_digest"]] if len(rows) == 1 else [""] * len(rows)
    return first_stage(names, digests, whole_weights([row["weight"] for row in rows]))


def reads_by_end(config: Config, checkpoint: Checkpoint | None, stage: Stage) -> list[int]:
    """How many windows of each source the run has read after train.steps, over all epochs, if it continues from
    `checkpoint` in `stage`."""
    progress = progress_now(config, checkpoint)
    ahead = max(0, config.train.steps - progress.step) * config.batch.global_sequences
    return stage.counts(progress.position + ahead)


def reads_so_far(config: Config, checkpoint: Checkpoint | None, stage: Stage) -> list[int]:
    """The same where it continues."""
    return stage.counts(progress_now(config, checkpoint).position)


def progress_now(config: Config, checkpoint: Checkpoint | None) -> Progress:
    """Of a run of `config` that begins, or continues from `checkpoint`."""
    if checkpoint is None:
        return Progress(0, 0)
    before, length = sequence_length_of(checkpoint), config.model.sequence_length
    progress = checkpoint.progress.in_sequences_of(length, before=before)
    try:
        rate = training_flops_per_token(parse_config(checkpoint.state["config"]).model)
    except ConfigError:  # of another version
        return progress
    return progress.at_rate(training_flops_per_token(config.model), before=rate, sequence_length=length)
