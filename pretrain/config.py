"""One run as one typed tree: frozen, unknown keys refused, every field with its unit and effect.

A field marked FREE may change when a run resumes (layout, machine, logging and stop settings); every other field is
part of what the run computes, and a change is refused by name unless `checkpoint.allow_changes` lists it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.config import ModelConfig, PositiveInt, Section

FREE: dict[str, Any] = {"on_resume": "free"}
"""`json_schema_extra` of fields that may change on resume."""

NonNegativeInt = Annotated[int, Field(ge=0)]


class DataConfig(Section):
    """Which shards are read."""

    manifest: str = Field("data/sample/manifest.json", json_schema_extra=FREE)
    """manifest.json written by data_prep, or its folder. A relative path is looked for in the current directory, then
    in the repository. It may move between resumes; its digest may not change."""
    verify: Literal["size", "full"] = Field("size", json_schema_extra=FREE)
    """`size`: sizes, indices and tokenizer are checked at start, the sha256 of a shard when it is first read.
    `full`: the sha256 of every shard at start."""


class BatchConfig(Section):
    """Sizes of batches, in sequences of model.sequence_length tokens."""

    global_sequences: PositiveInt = 64
    """Sequences per optimizer step, over all ranks and micro-steps."""
    micro_sequences: PositiveInt = Field(8, json_schema_extra=FREE)
    """Sequences per forward pass of one rank. global_sequences must be a multiple of micro_sequences x DP; the
    quotient is the number of micro-steps."""


class OptimizerConfig(Section):
    """torch AdamW; the defaults are the paper's."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 2.5e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of matrices and expert tensors; LayerNorms and biases are never decayed."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 0.25
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then a cosine."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up; clipped to train.steps - 1 (with one line saying so)."""
    final_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate after the last step, as a share of the peak."""


class TrainConfig(Section):
    """Length, precision and randomness of the run."""

    steps: PositiveInt = 100_000
    """Optimizer steps of the whole run; the length of the schedule."""
    stop_after_steps: PositiveInt | None = Field(None, json_schema_extra=FREE)
    """Absolute step after which this start stops (checkpointed), without changing the schedule; null: train.steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 keep fp32 master weights; fp16 scales the loss dynamically and needs CUDA."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights, data order and dropout masks."""
    recompute: Literal["none", "selective", "full"] = Field("none", json_schema_extra=FREE)
    """Activations of the blocks: `none` keeps them for the backward pass; `selective` keeps the outputs of matrix
    products and fused attention and computes the rest again; `full` keeps the blocks' inputs and computes a forward
    pass more. The numbers are the same."""
    threads: PositiveInt | None = Field(None, json_schema_extra=FREE)
    """CPU threads per rank; null: OMP_NUM_THREADS if set, else the cores divided by the ranks of this node."""


class ParallelConfig(Section):
    """Layout over ranks. Data parallelism is the number of ranks divided by the product of the other sizes."""

    tensor: PositiveInt = Field(1, json_schema_extra=FREE)
    """Tensor-parallel size: heads, experts (or hidden columns) and vocabulary are divided over so many neighbouring
    ranks; it must divide each of them. MoA divides a token's active slots instead of heads."""
    pipeline: PositiveInt = Field(1, json_schema_extra=FREE)
    """Pipeline stages: the blocks are divided over so many groups of ranks, at least one block each, balanced by cost,
    and micro-steps pass through them one after the other (1F1B). Needs zero = 1."""
    sequence: bool = Field(False, json_schema_extra=FREE)
    """Sequence parallelism inside the tensor-parallel group: between attention and feed-forward each rank holds
    sequence_length / tensor tokens, which must come out whole. Less memory for the same traffic; needs tensor > 1."""
    expert: PositiveInt = Field(1, json_schema_extra=FREE)
    """Expert-parallel size: sigma-MoE experts are divided over so many neighbouring data-parallel ranks, to which the
    tokens travel, instead of over tensor-parallel ones. It divides the experts and the data-parallel size; needs ZeRO 1
    or 2, and with tensor > 1 `sequence`."""
    zero: Literal[0, 1, 2, 3] = Field(1, json_schema_extra=FREE)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = Field(False, json_schema_extra=FREE)
    """Keep fp32 master weights and Adam's moments in CPU memory and update them there (needs zero >= 1 and pipeline =
    1): frees 12 bytes per parameter of GPU memory, at the price of a slower step."""


class CheckpointConfig(Section):
    """Saving and resuming, under RUN_DIR/checkpoints."""

    every_steps: PositiveInt = Field(1000, json_schema_extra=FREE)
    """Steps between checkpoints; the last step of a start is always saved."""
    keep_last: PositiveInt = Field(3, json_schema_extra=FREE)
    """Newest checkpoints kept; older ones are removed after a new one is committed."""
    resume: str = Field("auto", json_schema_extra=FREE)
    """auto: continue from the newest valid checkpoint of the run folder, if any. never: refuse to start where there is
    one. Anything else: path of the checkpoint to continue from."""
    allow_changes: tuple[str, ...] = Field((), json_schema_extra=FREE)
    """Dotted keys (or sections) that may differ from the checkpoint's, e.g. ["optimizer.learning_rate"]."""


class MonitorConfig(Section):
    """What is written while training."""

    print_every_steps: PositiveInt = Field(10, json_schema_extra=FREE)
    """Steps between lines on the terminal; metrics.jsonl gets every step."""
    tensorboard: bool = Field(True, json_schema_extra=FREE)
    """Write TensorBoard scalars to RUN_DIR/tensorboard."""
    tensorboard_every_steps: PositiveInt = Field(1, json_schema_extra=FREE)
    """Steps between TensorBoard scalars."""


class KernelsConfig(Section):
    """Which implementation computes the ops of model/kernels."""

    backend: Literal["auto", "reference", "cpu", "grouped_mm", "triton", "cuda"] = Field("auto", json_schema_extra=FREE)
    """auto: the fastest that the device has. reference: plain PyTorch, the specification. cpu: sorted rows, for CPUs.
    grouped_mm: F.grouped_mm for sigma-MoE, auto for the other ops. triton: our GPU kernels, CUDA only (on the CPU an
    interpreter for tests, with TRITON_INTERPRET=1). cuda: CUDA C++ for routing (needs nvcc), auto for the other ops.
    The choice per op is printed at start."""


class EvaluateConfig(Section):
    """Validation on the held-out split."""

    every_steps: NonNegativeInt = Field(1000, json_schema_extra=FREE)
    """Steps between validations; 0: only after the last step."""
    sequences: NonNegativeInt = Field(256, json_schema_extra=FREE)
    """Windows of the validation split used, spread evenly over it (all, if the split has fewer); 0 turns validation
    off."""
    streams: PositiveInt = Field(64, json_schema_extra=FREE)
    """With Transformer-XL memory: parallel streams that the windows are divided into, each read in order with memory
    carried along (the paper's validation), fewer where they would be of one window; other models take every window
    by itself."""


class Config(Section):
    """A pretraining run."""

    description: str = Field("", json_schema_extra=FREE)
    """What the run is for; printed at start."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: KernelsConfig = KernelsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Extra keys for DeepSpeed's own configuration, e.g. {"zero_optimization": {"overlap_comm": true}}; a key that is
    derived from the sections above is refused."""

    @model_validator(mode="after")
    def _rules_across_sections(self) -> Config:
        from pretrain.rules import check_rules

        check_rules(self)
        return self
