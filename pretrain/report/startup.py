"""What follows from the configuration: values that are printed once at start, each with its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.attention.rope import rotated_width
from model.config import MoAConfig, RopeConfig, SigmaMoEConfig
from pretrain.config.obstacles import of_a_micro_batch
from pretrain.config.schedule import warmup_steps
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.stages import Stage
from pretrain.data.windows import num_windows
from pretrain.parallel.layout import group_ranks, mesh
from pretrain.report.layout_text import groups_text, stage_text
from pretrain.report.model_text import model_family, model_text, parameter_count

GROUPS = {
    "pipeline": "ranks that hold the stages of one model",
    "data": "ranks that hold the same slice of the model",
    "tensor": "ranks that divide each layer and read the same data",
    "expert": "data-parallel ranks that divide the experts",
}
"""What the ranks of a group share, by dimension."""


@dataclass(frozen=True)
class DerivedValue:
    name: str
    value: str
    formula: str


def derived_values(
    config: Config,
    data_size: int,
    sources: Sources,
    stages: Sequence[Stage],
    reads: list[int],
    progress: Progress,
) -> list[DerivedValue]:
    """Everything that a user would otherwise compute by hand, in the order of the data flow. `stages`: of the data, the
    last one from this start on; `reads`: windows of each source that the run has read by its end; `progress`: where it
    continues."""
    most, T = config.data.max_tokens, config.model.sequence_length
    sizes = [num_windows(s.manifest, "train", T, max_tokens=most) for s in sources.sources]
    return [
        *_data_values(sources, sizes, reads),
        *_stage_values(stages),
        *_size_values(config, data_size, sum(sizes), sum(reads), progress),
        *_layout_values(config, data_size),
        *_divided_values(config),
        *_regulariser_values(config, data_size),
        *_experts_values(config),
        *_optional_values(config, sum(sizes), stages[-1], sources.tokenizer.vocab_size),
    ]


def _data_values(sources: Sources, sizes: list[int], reads: list[int]) -> list[DerivedValue]:
    if len(sizes) == 1:
        folder = str(sources.sources[0].manifest.folder)
        return [DerivedValue("data", folder, f"data.manifest, digest {sources.digest[:12]}")]
    return _mixture_values(sources, sizes, reads)


def _stage_values(stages: Sequence[Stage]) -> list[DerivedValue]:
    """The stages of a run whose sources or weights were changed."""
    if len(stages) == 1:
        return []
    why = "data.sources when it began; docs/streaming.md"
    return [DerivedValue(f"data stage {index}", stage.text(), why) for index, stage in enumerate(stages, 1)]


def _size_values(config: Config, data_size: int, windows: int, reads: int, progress: Progress) -> list[DerivedValue]:
    """Values that every run has. `windows`: windows of the training split, and `reads`: how many of them the run has
    read by its end, over all epochs; both of all sources together."""
    batch, model, steps = config.batch, config.model, config.train.steps
    count = parameter_count(model)
    micro_steps = config.micro_steps(data_size)
    tokens_per_step = batch.global_sequences * model.sequence_length
    left = max(0, steps - progress.step)
    of_run, so_far = progress.tokens(model.sequence_length) + tokens_per_step * left, "tokens per step x train.steps"
    if of_run != tokens_per_step * steps:  # steps before this start had others
        so_far = f"{of_run - tokens_per_step * left:,} so far + tokens per step x {left:,} steps"
    tokens = "train tokens - 1" if config.data.max_tokens is None else "at most data.max_tokens"
    return [
        DerivedValue("model", model_family(model), model_text(model)),
        DerivedValue("parameters, total", f"{count.total:,}", "counted on the meta device"),
        DerivedValue("parameters, active", f"{count.active:,}", "expert tensors count k / E, all others whole"),
        DerivedValue("data-parallel size", f"{data_size}", "ranks / (tensor x pipeline)"),
        DerivedValue("micro-steps", f"{micro_steps}", "global_sequences / (micro_sequences x DP)"),
        DerivedValue("tokens per step", f"{tokens_per_step:,}", "global_sequences x sequence_length"),
        DerivedValue("tokens of the run", f"{of_run:,}", so_far),
        DerivedValue("windows per epoch", f"{windows:,}", f"({tokens}) // sequence_length"),
        DerivedValue("epochs", f"{reads / windows:.2f}", "sequences of the run / windows"),
    ]


def _layout_values(config: Config, data_size: int) -> list[DerivedValue]:
    """The groups of every dimension that is divided, and the stages of a pipeline."""
    values = [
        DerivedValue(f"{name} groups", groups_text(ranks), GROUPS[name])
        for name, ranks in group_ranks(config, data_size).items()
    ]
    for stage in range(config.parallel.pipeline if config.parallel.pipeline > 1 else 0):
        of_stage = mesh(config, data_size)[stage].ravel()
        where = f"ranks {of_stage[0]}-{of_stage[-1]}; the longest stage is as short as can be"
        values.append(DerivedValue(f"stage {stage}", stage_text(config, stage), where))
    return values


def _divided_values(config: Config) -> list[DerivedValue]:
    """What a rank has of a sequence and of the experts, where they are divided."""
    model, parallel, values = config.model, config.parallel, []
    if parallel.sequence:
        formula = "sequence_length / tensor, between attention and feed-forward (parallel.sequence)"
        tokens = model.sequence_length // parallel.tensor
        values.append(DerivedValue("tokens of a sequence per rank", f"{tokens}", formula))
    if parallel.expert > 1 and model.feedforward.routers is not None:
        formula = "feedforward.num_experts / expert; the same on every expert-th data-parallel rank"
        experts = model.feedforward.routers.num_experts // parallel.expert
        values.append(DerivedValue("experts per rank", f"{experts}", formula))
    return values


def _regulariser_values(config: Config, data_size: int) -> list[DerivedValue]:
    """What the loss of a step depends on that layouts may change: nothing, but for these regularisers."""
    batch = config.batch
    value = f"{batch.micro_sequences * data_size} of {batch.global_sequences} sequences"
    formula = "micro_sequences x DP; another product is another loss ({} = micro_batch)"
    return [DerivedValue("a regulariser's batch", value, formula.format(key)) for key in of_a_micro_batch(config.model)]


def _experts_values(config: Config) -> list[DerivedValue]:
    """A note where nothing keeps the experts of a layer in use and no setting says that this is meant, as where a layer
    of experts was swapped in for a dense one. A weight of 0 that is written down, and expert dropout, are meant."""
    feedforward, attention, found = config.model.feedforward, config.model.attention, []
    if isinstance(attention, MoAConfig) and attention.router == "softmax":
        weights = ("z_loss_weight", "switch_loss_weight", "cv_loss_weight")
        if _is_left_alone(attention, weights):
            keys = "model.attention.z_loss_weight and switch_loss_weight"
            found.append(f"{keys} are not set (0.001 and 0.01 in configs/paper)")
    if isinstance(feedforward, SigmaMoEConfig) and _is_left_alone(feedforward, ("entropy_weight",)):
        found.append("model.feedforward.entropy_weight is not set (0.0001 to 0.001 in configs/paper)")
    return [DerivedValue("experts kept in use by", "no loss", "; ".join(found))] if found else []


def _is_left_alone(layer: MoAConfig | SigmaMoEConfig, weights: Sequence[str]) -> bool:
    has_choice = layer.routers.active < layer.routers.num_experts
    return has_choice and not layer.expert_dropout and not layer.model_fields_set & {*weights}


def _optional_values(config: Config, windows: int, stage: Stage, num_pieces: int) -> list[DerivedValue]:
    """Values that only some runs have. `num_pieces`: the tokenizer's."""
    model, schedule, G = config.model, config.schedule, stage.streams or config.batch.global_sequences
    cut = "global_sequences" if stage.streams is None else "global_sequences when the run began to read them"
    fraction = model.position.fraction if isinstance(model.position, RopeConfig) else 0.0
    rotated, head_dim = rotated_width(model.attention.head_dim, fraction), model.attention.head_dim
    again = "; memory is empty where they begin again" if model.memory_length else ""
    rows = (  # whether a run has it, name, value, formula
        (
            isinstance(model.position, RopeConfig),
            "rotated dimensions",
            f"{rotated} of {head_dim}",
            "position.fraction x head_dim, rounded down to even",
        ),
        (
            model.memory_length > 0,
            "memory",
            f"{model.memory_length} tokens",
            "position.memory_chunks x sequence_length",
        ),
        (
            config.reads_streams,
            "streams",
            f"{G} of {windows // G:,} chunks",
            f"{cut}; windows per epoch // streams{again}",
        ),
        (
            warmup_steps(config) != schedule.warmup_steps,
            "warm-up steps",
            f"{warmup_steps(config)}",
            f"schedule.warmup_steps = {schedule.warmup_steps} clipped to train.steps - 1",
        ),
        (
            model.vocab_size != num_pieces,
            "unused vocabulary rows",
            f"{model.vocab_size - num_pieces}",
            "model.vocab_size - tokenizer pieces",
        ),
    )
    return [DerivedValue(name, value, formula) for has_it, name, value, formula in rows if has_it]


def _mixture_values(sources: Sources, sizes: list[int], reads: list[int]) -> list[DerivedValue]:
    """One row per source: where, its share of the sequences, and how often the run reads it."""
    period = sum(source.weight for source in sources.sources)
    rows = [DerivedValue("data", f"{len(sizes)} sources", f"data.sources, digest {sources.digest[:12]}")]
    for source, size, count in zip(sources.sources, sizes, reads, strict=True):
        rows.append(
            DerivedValue(
                f"source {source.name}",
                f"{source.weight} of {period} sequences, {count / size:.2f} epochs",
                f"{source.manifest.folder}: {size:,} windows, digest {source.manifest.digest[:12]}",
            )
        )
    return rows
