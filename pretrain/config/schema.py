"""One run as one typed tree: frozen, unknown keys refused, every field with its unit and effect.

A field marked FREE may change when a run resumes (layout, machine, logging and stop settings); every other field is
part of what the run computes, and a change is refused by name unless `checkpoint.allow_changes` lists it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.json_config import Section
from model.config import ModelConfig, PositiveInt
from pretrain.config.fields import FREE, NonNegativeInt
from pretrain.config.watching import MonitorConfig, ResilienceConfig


class DataSource(Section):
    """One of several data sets that are mixed."""

    manifest: str
    """As data.manifest."""
    weight: Annotated[float, Field(gt=0.0)]
    """Share of the windows, relative to the other weights."""
    name: str = ""
    """The name in metrics and messages; empty: the folder's."""


class DataConfig(Section):
    """Which shards are read."""

    manifest: str = Field("data/sample/manifest.json", json_schema_extra=FREE)
    """manifest.json written by data_prep, or its folder. A relative path is looked for in the current directory, then
    in the repository. Or the URL of either (s3://bucket/c4), read through cache_dir; fsspec opens it, and you install
    the package that it needs, such as s3fs. It may move between resumes; its digest may not change."""
    sources: tuple[DataSource, ...] = Field((), json_schema_extra=FREE)
    """Several data sets instead of `manifest`, which is then not read: [{"manifest": "data/c4", "weight": 0.7},
    {"manifest": "data/pes2o", "weight": 0.3}], each with a `name` if it should not have the folder's. A fixed schedule
    of the weights decides which one a sequence comes from; each is shuffled by itself and has epochs of its own. They
    may move between resumes. Contents, order and weights change only with checkpoint.allow_changes, and then every
    source goes on where it stands (docs/streaming.md)."""
    order: Literal["shuffled", "streams"] | None = None
    """shuffled: every window once an epoch, in an order that train.seed decides. streams: the split is cut into
    batch.global_sequences contiguous streams, and a step reads the next window of each, without shuffling: what
    memory needs, and how every published run read its text. null: streams with memory, else shuffled."""
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Uses only this many tokens from the start of the train split; data with fewer are refused. The published runs
    used global_sequences x sequence_length x (steps + 100) of C4 and peS2o, which decides where their streams begin.
    null: the whole split."""
    shuffle_block_windows: NonNegativeInt = 0
    """For network file systems: shuffle blocks of this many neighbouring windows, then the windows of some blocks
    together, so that reads stay local. 0: every window by itself, over the whole split."""
    shuffle_blocks: PositiveInt = 64
    """Blocks whose windows are shuffled together, with shuffle_block_windows > 0."""
    verify: Literal["size", "full"] = Field("size", json_schema_extra=FREE)
    """`size`: sizes, indices and tokenizer are checked at start, the sha256 of a shard when it is first read; from 16
    ranks on at start, if that is at most 32 GiB a rank, but for shards on a shared disk that an earlier start of the
    run has hashed and whose size and time of change are the same. `full`: the sha256 of every shard at every start.
    The ranks divide the files among them."""

    document_mask: bool = False
    """Documents in a window do not see each other: attention stays inside a document, whose positions start at 0.
    Needs model.position.type = rope and parallel.pipeline = 1. On a CPU, in fp32 and with heads that
    are too wide for our GPU kernels the mask of a sequence takes sequence_length^2 bytes; elsewhere there is none."""
    cache_dir: str | None = Field(None, json_schema_extra=FREE)
    """Folder on a disk of each node for the shards of data sets behind URLs: fetched whole when first read, checked
    against their sha256, shared by the processes of the node. Needed for URLs."""
    cache_bytes: Annotated[int, Field(ge=1, lt=2**63)] = Field(100_000_000_000, json_schema_extra=FREE)
    """Above this total size, the least recently used shards in cache_dir are removed; other files there stay."""

    @property
    def locations(self) -> list[str]:
        """The manifests, folders or URLs of all data sets that are read."""
        return [source.manifest for source in self.sources] or [self.manifest]


class BatchConfig(Section):
    """Sizes of batches, in sequences of model.sequence_length tokens."""

    global_sequences: PositiveInt = 64
    """Sequences per optimizer step, over all ranks and micro-steps."""
    micro_sequences: PositiveInt = Field(8, json_schema_extra=FREE)
    """Sequences per forward pass of one rank. global_sequences must be a multiple of micro_sequences x DP; the
    quotient is the number of micro-steps. It changes no number but by rounding, unless a regulariser has the scope
    micro_batch."""


class UndecayedGroupConfig(Section):
    """What the optimizer does differently with a group of parameters that are never decayed."""

    learning_rate_ratio: Annotated[float, Field(ge=0.0)] = 1.0
    """Learning rate of the group, as a share of that of the step; 0: the group stays as it is. Its gradients still
    count in the norm that is clipped."""


class GroupConfig(UndecayedGroupConfig):
    """What the optimizer does differently with a group of parameters."""

    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Decoupled weight decay of the group's matrices and expert tensors; null: optimizer.weight_decay."""


class GroupsConfig(Section):
    """Groups of parameters, as the curves `gradient norm by group` name them. A group that the model does not have is
    refused where it is given."""

    embedding: GroupConfig = GroupConfig()
    """The token embedding, and with it a tied output layer."""
    attention: GroupConfig = GroupConfig()
    """Dense matrices of attention, and its biases and scales."""
    routers: GroupConfig = GroupConfig()
    """Selectors of experts, of attention and of the feed-forward."""
    experts: GroupConfig = GroupConfig()
    """Expert tensors of attention and of the feed-forward."""
    feedforward: GroupConfig = GroupConfig()
    """Matrices and biases of a dense feed-forward."""
    norms: UndecayedGroupConfig = UndecayedGroupConfig()
    """LayerNorms."""
    head: GroupConfig = GroupConfig()
    """The output layer; where it is tied, its bias."""


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
    groups: GroupsConfig = GroupsConfig()


class ScheduleConfig(Section):
    """Learning rate over the steps: a linear warm-up, then a shape. A run of shape constant, inverse_sqrt or wsd can be
    extended: on resume these keys and train.steps may change if the steps so far keep their rates."""

    shape: Literal["cosine", "published", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """cosine, linear: from the peak to final_ratio of it in the steps after the warm-up. published: the paper's, a
    cosine of train.steps steps that begins after the warm-up and is cut at train.steps. constant: the peak. wsd
    (warm-up, stable, decay): the peak, and down to final_ratio of it in the last decay_steps. inverse_sqrt: the peak x
    sqrt((warmup_steps + 1) / (step + 1)), step counted from 0."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up. With cosine, linear and published it is clipped to train.steps - 1, and a line says so;
    with the others a shorter run ends inside the warm-up."""
    final_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate after the last step (published: after the whole cosine), as a share of the peak."""
    decay_steps: PositiveInt | None = None
    """Steps of wsd's decay, the last ones of train.steps; 10% to 20% of them is usual (arXiv 2405.18392)."""
    decay: Literal["linear", "sqrt"] = "linear"
    """How wsd decays, where p is the share of decay_steps done: 1 - p, or 1 - sqrt(p)."""

    @model_validator(mode="after")
    def _used(self) -> ScheduleConfig:
        if self.shape == "wsd" and self.decay_steps is None:
            raise ValueError("shape = wsd needs schedule.decay_steps; set it to 10% to 20% of train.steps")
        if self.shape != "wsd" and (self.decay_steps is not None or self.decay != "linear"):
            key = "decay" if self.decay_steps is None else "decay_steps"
            raise ValueError(f"schedule.{key} belongs to shape = wsd, not {self.shape}; remove it or set shape to wsd")
        if self.shape in ("constant", "inverse_sqrt") and self.final_ratio:
            raise ValueError(f"schedule.final_ratio has no meaning with shape = {self.shape}; remove it")
        return self


class TrainConfig(Section):
    """Length, precision and randomness of the run."""

    steps: PositiveInt = 100_000
    """Optimizer steps of the whole run; the length of the schedule. With schedule.shape constant, inverse_sqrt, or wsd
    before its decay, it may change on resume."""
    stop_after_steps: PositiveInt | None = Field(None, json_schema_extra=FREE)
    """This start saves a checkpoint and stops after this step of the run; the schedule stays. null: train.steps."""
    device: Literal["auto", "cuda", "cpu"] = Field("auto", json_schema_extra=FREE)
    """What the ranks compute on. auto: a GPU if torch can use one, else the CPU; refused where there is an NVIDIA
    driver, or a job or container was promised a GPU, that torch cannot use. cuda: never the CPU. cpu: never a GPU. The
    environment's DS_ACCELERATOR, if set, must agree, and decides for auto."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 keep fp32 master weights; fp16 scales the loss dynamically and needs CUDA."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights, data order and dropout masks."""
    init_from: str | None = None
    """Checkpoint (of weights alone too), or run folder for its newest, whose weights the run begins with instead of
    random ones: at step 0, with a new optimizer, for example on other data. Shapes and tokenizer must be the same;
    other settings of the model may differ, and are printed. A run that has checkpoints continues from those."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """d of an exponential moving average of the weights, a = d a + (1 - d) w after every update: 0.999 averages over
    about 1,000 steps. It begins at the initial weights, which still count d^n after n steps. 4 bytes per parameter,
    divided like the optimizer's states; in checkpoints. Training itself is the same. 0: off."""
    deterministic: bool = Field(False, json_schema_extra=FREE)
    """On a GPU, the same numbers bit by bit whenever the same start is repeated or a run is resumed, at the price of a
    slower attention: torch's deterministic algorithms, without cuDNN's attention and, between GPUs, without sums in
    NVLink's switches (NVLS). false: gradients of attention, and so all that follows, differ by rounding from run to
    run. On a CPU runs always repeat bit by bit."""
    recompute: Literal["none", "selective", "full"] = Field("none", json_schema_extra=FREE)
    """Activations of the blocks: `none` keeps them for the backward pass; `selective` keeps the outputs of matrix
    products and fused attention and computes the rest again; `full` keeps the blocks' inputs and computes one more
    forward pass. The numbers are the same."""
    cuda_graph: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """Forward and backward pass of a micro-step as recorded CUDA graphs, which the host replays instead of launching
    each kernel: faster where small micro-batches leave the GPU waiting for the host. The numbers are the same; a copy
    of all gradients (2 bytes per parameter in bf16) is kept. on: refused where that is impossible (a CPU, parallel
    tensor, pipeline or expert above 1, ZeRO 3, recorded or replayed routing). auto: wherever it is possible; a line at
    start says what was decided and why. off: never."""
    compile: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """Blocks compiled by torch.compile, which fuses what lies between the products. The numbers are the same to
    rounding; dropout masks and data to the last bit. The first step takes a minute or more, and on a CPU a C++ compiler
    must be installed. on: refused where that is impossible (parallel tensor or expert above 1, ZeRO 3, selective
    recomputation, recorded or replayed routing). auto: a line at start says what was decided and why; nothing is
    compiled: on a CPU and on an H200 CUDA graphs or nothing were faster. off: never."""
    record_routing: bool = Field(False, json_schema_extra=FREE)
    """Write the experts that every router chooses to RUN_DIR/routing, a byte for each choice of each token and step (in
    switchall_tiny 0.33 MB a step), for train.replay_routing of another run."""
    replay_routing: str | None = Field(None, json_schema_extra=FREE)
    """Run folder with record_routing whose choices this run takes instead of its own, to compare the two: logits,
    scores and gradients are this run's, so the two differ by rounding and not by a choice near a tie. metrics.jsonl
    says how many choices this run would have made differently (routing_flips) and how far from a tie the farthest was
    (routing_flip_distance)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, json_schema_extra=FREE)
    """CPU threads per rank; null: OMP_NUM_THREADS if set, else the cores divided by the ranks of this node."""

    @property
    def last_step(self) -> int:
        """Where this start ends."""
        return min(self.steps, self.stop_after_steps or self.steps)


class ParallelConfig(Section):
    """Layout over ranks. Data parallelism is the number of ranks divided by the product of the other sizes."""

    tensor: PositiveInt = Field(1, json_schema_extra=FREE)
    """Tensor-parallel size: heads, experts (or hidden columns) and vocabulary are divided over this many neighbouring
    ranks; it must divide each of them. MoA divides a token's active slots instead of heads."""
    pipeline: PositiveInt = Field(1, json_schema_extra=FREE)
    """Pipeline stages: the blocks are divided over this many groups of ranks, at least one block each, balanced by
    cost, and micro-steps pass through them one after the other (1F1B). Needs zero = 1."""
    sequence: bool = Field(False, json_schema_extra=FREE)
    """Sequence parallelism inside the tensor-parallel group: between attention and feed-forward each rank holds
    sequence_length / tensor tokens, which must be a whole number. Less memory for the same traffic; needs tensor >
    1."""
    expert: PositiveInt = Field(1, json_schema_extra=FREE)
    """Expert-parallel size: sigma-MoE experts are divided over this many neighbouring data-parallel ranks, to which the
    tokens travel, instead of over tensor-parallel ones. It must divide the number of experts and the data-parallel
    size. Needs ZeRO 1 or 2, and `sequence` if tensor > 1."""
    zero: Literal[0, 1, 2, 3] = Field(1, json_schema_extra=FREE)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    reduce_dtype: Literal["fp32", "bf16"] = Field("fp32", json_schema_extra=FREE)
    """In which gradients are summed over data-parallel ranks. bf16 sends half the bytes, for a slow network between
    nodes, and rounds every sum to 8 bits: losses then differ a little with the number of ranks. Micro-steps are summed
    in fp32 all the same. Needs train.precision = bf16."""
    offload_optimizer: bool = Field(False, json_schema_extra=FREE)
    """Keep fp32 master weights and Adam's moments in CPU memory and update them there (needs zero >= 1 and pipeline =
    1): frees 12 bytes per parameter of GPU memory, at the price of a slower step."""


class CheckpointConfig(Section):
    """Saving and resuming, under RUN_DIR/checkpoints."""

    every_steps: PositiveInt = Field(1000, json_schema_extra=FREE)
    """Steps between checkpoints; the last step of a start is always saved."""
    every_minutes: Annotated[float, Field(ge=0.0)] = Field(0.0, json_schema_extra=FREE)
    """Also a checkpoint after the first step that begins this many minutes or more after the last one (or the start),
    by the clock of rank 0, unless that is still being written. Every checkpoint starts the minutes anew. 0: off."""
    keep_last: PositiveInt = Field(3, json_schema_extra=FREE)
    """Newest checkpoints kept; older ones are removed after a new one is committed, unless a key below keeps them."""
    keep_every_steps: NonNegativeInt = Field(0, json_schema_extra=FREE)
    """Checkpoints of steps divisible by this are kept for ever; 0: none for that reason."""
    keep_best: NonNegativeInt = Field(0, json_schema_extra=FREE)
    """Number of checkpoints with the lowest validation loss that are kept, among those of validated steps (see
    evaluate.every_steps)."""
    asynchronous: bool = Field(True, json_schema_extra=FREE)
    """Training stands still only while the state is copied to a buffer in CPU memory (12 bytes per parameter, divided
    over the ranks); the files are written meanwhile. false: training waits until they are on the disk, and there is no
    buffer."""
    resume: str = Field("auto", json_schema_extra=FREE)
    """auto: continue from the newest valid checkpoint of the run folder, if any. never: refuse to start where there is
    one. Anything else: path of the checkpoint to continue from."""
    allow_changes: tuple[str, ...] = Field((), json_schema_extra=FREE)
    """Dotted keys (or sections) that may differ from the checkpoint's, e.g. ["optimizer.learning_rate"]."""


class KernelsConfig(Section):
    """Which implementation computes the ops of model/kernels."""

    backend: Literal["auto", "reference", "cpu", "grouped_mm", "dense", "sets", "triton", "cuda"] = Field(
        "auto", json_schema_extra=FREE
    )
    """auto: the fastest that the device has. reference: plain PyTorch, the specification. cpu: sorted rows, for CPUs.
    grouped_mm: F.grouped_mm for sigma-MoE, auto for the other ops. dense: one GEMM over all experts for SwitchHead's
    projections, two for the gradients of routing, auto for the other ops. sets: GPU kernels for
    SwitchHead's projections that multiply the chosen experts alone (at most 6 experts a head; no GPU has run them),
    auto for the other ops. triton: our GPU kernels, CUDA only (on the CPU an interpreter for tests, with
    TRITON_INTERPRET=1). cuda: CUDA C++ for routing (needs nvcc), auto for the other ops. The choice per op is printed
    at start."""


class EvaluateConfig(Section):
    """Validation on a held-out split."""

    split: Literal["validation", "test"] = Field("validation", json_schema_extra=FREE)
    """The split that is read; `test` needs data that have one. Most published figures for Wikitext-103 and Enwik8 are
    for test. Use it only for such a comparison: what was chosen by it (checkpoint.keep_best, settings) can no longer be
    tested on it."""

    every_steps: NonNegativeInt = Field(1000, json_schema_extra=FREE)
    """Steps between validations; 0: only after the last step."""
    sequences: NonNegativeInt = Field(256, json_schema_extra=FREE)
    """Number of windows of the split that are used (all, if it has fewer), see `placement`; 0 turns validation off."""
    placement: Literal["spread", "start"] = Field("spread", json_schema_extra=FREE)
    """Where these windows lie. spread: evenly over the split, in streams whose lengths differ by one at most. start:
    the first ones of the split, in streams of equal length, as published: up to streams - 1 windows at the end are left
    out, also for models without memory."""
    streams: PositiveInt = Field(64, json_schema_extra=FREE)
    """With memory: number of parallel streams that the windows are divided into, each read in order with memory carried
    along (the paper's validation); fewer if a stream would have only one window. Other models take every window by
    itself."""
    ema: bool = Field(False, json_schema_extra=FREE)
    """Validate the moving average of the weights (train.ema_decay) too, after the weights: ema_loss, ema_perplexity.
    Doubles the time of a validation."""
    tasks: dict[Literal["lambada", "blimp", "cbt"], str] = Field(default_factory=dict, json_schema_extra=FREE)
    """Tasks that the run computes while it trains, and the published files of each, e.g. {"lambada": "raw/lambada"}: a
    file or folder, below the current directory or the repository. docs/use.md says what they are."""
    tasks_every_steps: NonNegativeInt = Field(0, json_schema_extra=FREE)
    """Steps between evaluations of `tasks`, batch.micro_sequences texts at once; 0: only after the last step."""
    tasks_limit: NonNegativeInt = Field(0, json_schema_extra=FREE)
    """Examples of each file that are used, the first ones; 0: all. CBT has 100,000 texts of a page."""


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
    resilience: ResilienceConfig = ResilienceConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: KernelsConfig = KernelsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Extra keys for DeepSpeed's own configuration, e.g. {"zero_optimization": {"overlap_comm": true}}. A key that is
    derived from the sections above, has no effect here, was removed from DeepSpeed or is unknown to it is refused; the
    end of this help lists those that are passed on."""

    @property
    def reads_streams(self) -> bool:
        """Whether training reads contiguous streams: data.order, null resolved."""
        return self.data.order == "streams" or self.model.memory_length > 0

    def replaced(self, section: str, **values: Any) -> Config:
        """With other values of a section; nothing is checked."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def data_size(self, num_ranks: int) -> int:
        """Data-parallel ranks of a run on so many ranks."""
        return num_ranks // (self.parallel.tensor * self.parallel.pipeline)

    def micro_steps(self, data_size: int) -> int:
        """Micro-steps of an optimizer step on so many data-parallel ranks."""
        return self.batch.global_sequences // (self.batch.micro_sequences * data_size)
