"""What follows from the configuration: values printed once with their formula, and DeepSpeed's JSON."""

from __future__ import annotations

from dataclasses import dataclass

from model.attention.rope import rotated_width
from model.config import ModelConfig, RopeConfig, SigmaMoEConfig
from model.language_model import build_on_meta
from model.parameters import ParameterCount, count_parameters
from pretrain.config.schedule import warmup_steps
from pretrain.config.schema import Config
from pretrain.data.mixture import MixtureSchedule
from pretrain.data.sources import Sources
from pretrain.data.windows import num_windows
from pretrain.parallel.layout import group_ranks, groups_text, mesh, stage_text
from pretrain.report.model_text import model_family, model_text

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


def _windows_formula(config: Config) -> str:
    tokens = "train tokens - 1" if config.data.max_tokens is None else "at most data.max_tokens"
    return f"({tokens}) // sequence_length"


def derived_values(config: Config, data_size: int, sources: Sources, run_dir: str) -> list[DerivedValue]:
    """Everything that a user would otherwise compute by hand, in the order of the data flow."""
    batch, model, train = config.batch, config.model, config.train
    count = parameter_count(model)
    most = config.data.max_tokens
    sizes = [num_windows(s.manifest, "train", model.sequence_length, max_tokens=most) for s in sources.sources]
    windows = sum(sizes)
    tokens_per_step = batch.global_sequences * model.sequence_length
    micro_steps = batch.global_sequences // (batch.micro_sequences * data_size)
    values = [
        DerivedValue("run folder", run_dir, "--run-dir, or runs/ + name of the config file"),
        DerivedValue("data", str(sources.sources[0].manifest.folder), f"data.manifest, digest {sources.digest[:12]}"),
        DerivedValue("model", model_family(model), model_text(model)),
        DerivedValue("parameters, total", f"{count.total:,}", "counted on the meta device"),
        DerivedValue("parameters, active", f"{count.active:,}", "expert tensors count k / E, all others whole"),
        DerivedValue("data-parallel size", f"{data_size}", "ranks / (tensor x pipeline)"),
        DerivedValue("micro-steps", f"{micro_steps}", "global_sequences / (micro_sequences x DP)"),
        DerivedValue("tokens per step", f"{tokens_per_step:,}", "global_sequences x sequence_length"),
        DerivedValue("tokens of the run", f"{tokens_per_step * train.steps:,}", "tokens per step x train.steps"),
        DerivedValue("windows per epoch", f"{windows:,}", _windows_formula(config)),
        DerivedValue(
            "epochs", f"{batch.global_sequences * train.steps / windows:.2f}", "sequences of the run / windows"
        ),
    ]
    if len(sizes) > 1:
        place = next(index for index, value in enumerate(values) if value.name == "data")
        values[place : place + 1] = _mixture_values(config, sources, sizes)
    tensor = config.parallel.tensor
    for name, ranks in group_ranks(config, data_size).items():
        values.append(DerivedValue(f"{name} groups", groups_text(ranks), GROUPS[name]))
    if config.parallel.pipeline > 1:
        for stage in range(config.parallel.pipeline):
            of_stage = mesh(config, data_size)[stage].ravel()
            values.append(
                DerivedValue(
                    f"stage {stage}",
                    stage_text(config, stage),
                    f"ranks {of_stage[0]}-{of_stage[-1]}; the longest stage is as short as can be",
                )
            )
    if config.parallel.sequence:
        values.append(
            DerivedValue(
                "tokens of a sequence per rank",
                f"{model.sequence_length // tensor}",
                "sequence_length / tensor, between attention and feed-forward (parallel.sequence)",
            )
        )
    if config.parallel.expert > 1 and isinstance(model.feedforward, SigmaMoEConfig):
        held = model.feedforward.num_experts // config.parallel.expert
        values.append(
            DerivedValue(
                "experts per rank",
                f"{held}",
                "feedforward.num_experts / expert; the same on every expert-th data-parallel rank",
            )
        )
    if isinstance(model.position, RopeConfig):
        rotated = rotated_width(model.attention.head_dim, model.position.fraction)
        values.append(
            DerivedValue(
                "rotated dimensions",
                f"{rotated} of {model.attention.head_dim}",
                "position.fraction x head_dim, rounded down to even",
            )
        )
    if model.memory_length:
        values.append(
            DerivedValue("memory", f"{model.memory_length} tokens", "position.memory_chunks x sequence_length")
        )
    if config.reads_streams:
        values.append(
            DerivedValue(
                "streams",
                f"{batch.global_sequences} of {windows // batch.global_sequences:,} chunks",
                "global_sequences; windows per epoch // global_sequences"
                + ("; memory is empty where they begin again" if model.memory_length else ""),
            )
        )
    if warmup_steps(config) != config.schedule.warmup_steps:
        values.append(
            DerivedValue(
                "warm-up steps",
                f"{warmup_steps(config)}",
                f"schedule.warmup_steps = {config.schedule.warmup_steps} clipped to train.steps - 1",
            )
        )
    unused = model.vocab_size - sources.tokenizer.vocab_size
    if unused:
        values.append(DerivedValue("unused vocabulary rows", f"{unused}", "model.vocab_size - tokenizer pieces"))
    return values


def _mixture_values(config: Config, sources: Sources, sizes: list[int]) -> list[DerivedValue]:
    """One row per source: where, its share of the sequences, and how often the run reads it."""
    schedule = MixtureSchedule([source.weight for source in sources.sources])
    counts = schedule.counts(config.batch.global_sequences * config.train.steps)
    rows = [DerivedValue("data", f"{len(sizes)} sources", f"data.sources, digest {sources.digest[:12]}")]
    for source, size, count in zip(sources.sources, sizes, counts, strict=True):
        rows.append(
            DerivedValue(
                f"source {source.name}",
                f"{source.weight} of {schedule.period} sequences, {count / size:.2f} epochs",
                f"{source.manifest.folder}: {size:,} windows, digest {source.manifest.digest[:12]}",
            )
        )
    return rows


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Total and active parameters, counted on the built model without storage."""
    return count_parameters(build_on_meta(model), model)
