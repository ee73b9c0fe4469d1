"""Small runs for tests: a configuration, the real trainer on N ranks, and the same training in plain PyTorch."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import model.attention.moa
import model.attention.switchhead
import model.feedforward.sigma_moe
import model.kernels.ops.route
from model.kernels.ops.route import Choice
from model.kernels.ops.sigma_moe import HeldExperts, is_swiglu
from model.language_model import build_model, routing_statistics
from model.memory import layer_memories
from model.parallel.sharding import sharded_axis
from model.parameters import owner_of, parameter_specs
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.config.loading import apply_override, parse_config
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.windows import TrainingStream
from pretrain.engine.gradient_norm import GradientNorm
from pretrain.loop import train
from pretrain.parallel.agreement import agree
from pretrain.parallel.context import parallel_context
from pretrain.report.metrics import StepResult
from pretrain.trainer import RunSetup, Trainer, build_trainer
from tests.corpus import VOCAB_SIZE
from tests.tensors import gradient_of


def small_config(prepared: Path, *overrides: str) -> Config:
    """SwitchAll with two odd-sized layers, 8 sequences of 16 tokens a step, fp32, clipping active, regulariser on."""
    tree: dict[str, Any] = {
        "model": {
            "d_model": 24,
            "num_layers": 2,
            "vocab_size": VOCAB_SIZE,
            "sequence_length": 16,
            "attention": {"type": "switchhead", "num_heads": 2, "head_dim": 6, "num_experts": 3, "active_experts": 2},
            "feedforward": {
                "type": "sigma_moe",
                "num_experts": 5,
                "expert_size": 7,
                "active_experts": 2,
                "entropy_weight": 0.05,
            },
        },
        "data": {"manifest": str(prepared)},
        "batch": {"global_sequences": 8, "micro_sequences": 4},
        "optimizer": {"learning_rate": 0.004, "clip_norm": 0.5},
        "schedule": {"warmup_steps": 3},
        "train": {"steps": 30, "precision": "fp32", "seed": 17},
        "evaluate": {"sequences": 24},
        "monitor": {"tensorboard": False},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def light_config(prepared: Path, *overrides: str, ranks: int = 1) -> Config:
    """`small_config` with one layer, and one micro-step where `ranks` ranks divide the sequences: a third of the
    processor time, for tests of what stands around a step, where neither layers nor accumulation matter."""
    return small_config(prepared, "model.num_layers=1", f"batch.micro_sequences={8 // ranks}", *overrides)


MOA = (
    'model.attention={"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5, "z_loss_weight": 0.01, '
    '"switch_loss_weight": 0.3, "cv_loss_weight": 0.3}'
)
"""Override of `small_config`: MoA attention with all of its losses, strong enough to be seen."""
TOLERANCE = 1e-5
"""Relative: what rounding in another order of summation may change in a few steps."""
COMPARED = ("step", "loss", "auxiliary_loss", "grad_norm", "lr", "tokens")
"""Of a line of metrics.jsonl: what another layout must give too."""
ROUTING = ("attention_load_max", "feedforward_load_max", "routing_negative_entropy")
"""And with experts."""


def trainer_of(config: Config, resumed: Checkpoint | None = None) -> Trainer:
    """The real trainer of this rank, on the CPU. Collective."""
    return build_trainer(RunSetup(config, Sources.load(config), parallel_context(config), torch.device("cpu")), resumed)


def one_step(trainer: Trainer, progress: Progress) -> StepResult:
    """The step after `progress`, read at once. Collective."""
    given = trainer.read_input(progress)
    agree(given.error)
    return trainer.launch(progress, given).read()


@dataclass
class Trace:
    """What a run computed: per step loss and gradient norm; per parameter the gradient of chosen steps; weights."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    loads: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Per step and router: how often each expert was chosen, [E] or [H, E]."""
    smallest_margin: float = float("inf")
    """Between the last chosen and the first other score of any router."""
    smallest_activation: float = float("inf")
    """|x W_1[e]| of the nearest that a chosen expert's ReLU came to its kink, where rounding decides a gradient."""


class Counter:
    """Counts what a router chose for the last `tokens` tokens of each sequence: those before are memory, which counted
    when it was new."""

    replaces = False

    def __init__(self, shape: tuple[int, ...], tokens: int) -> None:
        self.load, self._tokens = torch.zeros(shape, dtype=torch.int64), tokens

    def settle(self, own: torch.Tensor, logits: torch.Tensor, place: Any, *, is_repeated: bool) -> torch.Tensor:
        rows, counted = self.load.view(-1, self.load.shape[-1]), own[:, -self._tokens :]
        for head, of_head in zip(rows, counted.unbind(2), strict=True):
            head += torch.bincount(of_head.flatten(), minlength=len(head))
        return own


def engine_trace(rank: int, configs: list[Config], steps: int, gradient_steps: tuple[int, ...]) -> list[Trace]:
    """Runs every configuration on this gloo group, through the real trainer; gradients are copied before clipping."""
    traces = []
    for config in configs:
        trainer = trainer_of(config)
        traces.append(_trace_one(trainer, steps, gradient_steps))
        trainer.engine.destroy()
    return traces if rank == 0 else []


def _trace_one(trainer: Trainer, steps: int, gradient_steps: tuple[int, ...]) -> Trace:
    from deepspeed.utils import safe_get_full_grad

    trace, before_step, now = Trace(), GradientNorm.before_step, 0
    engine = trainer.engine

    def capture() -> None:  # where clipping has not happened yet, at any ZeRO stage
        if now in gradient_steps:
            own = {
                name: _whole(name, safe_get_full_grad(p).detach().reshape(getattr(p, "ds_shape", p.shape)), trainer)
                for name, p in engine.module.named_parameters()
            }
            trace.gradients[now] = _of_all_stages(own, trainer)

    def capture_first(self: GradientNorm) -> None:
        capture()
        before_step(self)

    if trainer.setup.parallel.pipeline_size == 1:
        GradientNorm.before_step = capture_first
    else:
        take_step = engine._take_model_step

        def capture_then_step(*args: Any) -> None:
            capture()
            take_step(*args)

        engine._take_model_step = capture_then_step
    for now in range(steps):
        result = one_step(trainer, Progress(now, now * trainer.setup.config.batch.global_sequences))
        trace.losses.append(result.sums.loss)
        trace.loads.append(result.sums.load)
        trace.grad_norms.append(float("nan") if result.sums.grad_norm is None else result.sums.grad_norm)
    GradientNorm.before_step = before_step
    return trace


def _whole(name: str, part: torch.Tensor, trainer: Trainer) -> torch.Tensor:
    """The gradient of the whole parameter from those of the ranks that it is divided over; of what tensor-parallel
    ranks replicate, checks that they agree bit by bit: otherwise their weights would drift apart."""
    parallel, spec = trainer.setup.parallel, parameter_specs(trainer.setup.config.model)[name]
    axis = sharded_axis(spec, expert_size=parallel.expert_size)
    if axis != "tensor" and parallel.tensor_group is not None:
        replicas = _gathered(part, parallel.tensor_group)
        assert all(torch.equal(other, part) for other in replicas), f"{name}: replicas have different gradients"
    group = {"tensor": parallel.tensor_group, "expert": parallel.expert_group, None: None}[axis]
    if group is None:
        return part.clone()
    assert spec.divided is not None
    return torch.cat(_gathered(part, group), spec.divided)


def _gathered(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return parts


def _of_all_stages(own: dict[str, torch.Tensor], trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the whole model from those of the pipeline stages; checks that a tied weight's are the same."""
    group, config = trainer.setup.parallel.pipeline_group, trainer.setup.config.model
    if group is None:
        return own
    stages: list[Any] = [None] * trainer.setup.parallel.pipeline_size
    torch.distributed.all_gather_object(stages, own, group=group)
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, gradient in stage.items():
            owner = owner_of(name, config)
            assert owner not in found or gradient_error(gradient, found[owner]) < 1e-6, f"{name}: tied copies differ"
            found.setdefault(owner, gradient)
    return found


def one_parameter_group(name: str, parameter: torch.nn.Parameter, config: Config) -> dict[str, Any]:
    """Of torch's AdamW, by what names of parameters look like alone."""
    own, decay = config.optimizer.groups, config.optimizer.weight_decay
    if "norm" in name:
        return {"params": [parameter], "weight_decay": 0.0, "ratio": own.norms.learning_rate_ratio}
    if name.startswith(("embedding", "head")):
        group = own.embedding if name.startswith("embedding") else own.head
    elif name.endswith("_experts"):
        group = own.experts
    elif name.endswith(("selector", "router")):
        group = own.routers
    else:
        group = own.attention if ".attention." in name else own.feedforward
    decay = decay if group.weight_decay is None else group.weight_decay
    decay = 0.0 if name.endswith(("bias", "scale")) else decay
    return {"params": [parameter], "weight_decay": decay, "ratio": group.learning_rate_ratio}


def plain_trace(config: Config, steps: int, gradient_steps: tuple[int, ...]) -> Trace:
    """The same training in one process without DeepSpeed: plain backward, torch clipping, torch AdamW."""
    reader = Sources.load(config).reader("train", config)
    stream = TrainingStream(reader, config, data_rank=0, data_size=1)
    network = build_model(config.model, seed=config.train.seed)
    names = dict(network.named_parameters())
    groups = [one_parameter_group(name, parameter, config) for name, parameter in names.items()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optimizer.betas, eps=config.optimizer.eps)
    for _, memory in layer_memories(network):
        memory.assign(stream.streams(), config.batch.global_sequences)
    trace, original, measured_heads = Trace(), model.kernels.ops.route.route, 0

    def measured(x: torch.Tensor, weight: torch.Tensor, k: int, **options: Any) -> Any:
        nonlocal measured_heads
        measured_heads += weight.shape[0]
        routing = original(x, weight, k, **options)
        keep, scores = options.get("keep"), torch.sigmoid(routing.logits.detach())
        if keep is not None:
            scores = scores * keep if options.get("drop_scores") else scores.masked_fill(~keep, float("-inf"))
        if k < weight.shape[1]:
            ordered = scores.sort(dim=-1, descending=True).values
            last_in, first_out = ordered[..., k - 1], ordered[..., k]
            # Two dropped experts tie by construction, and the lowest index wins in every layout.
            gap = (last_in - first_out)[~((last_in == first_out) & ((last_in == 0) | last_in.isinf()))]
            trace.smallest_margin = min([trace.smallest_margin, *gap.flatten().tolist()])
        return routing

    sigma_moe = model.feedforward.sigma_moe.sigma_moe

    def measured_experts(x: torch.Tensor, choice: Choice, experts: HeldExperts, **options: Any) -> torch.Tensor:
        if not is_swiglu(experts.up, experts.down):
            products = torch.einsum("nd,edw->new", x.detach(), experts.up.detach())
            chosen = products[torch.arange(len(x))[:, None], choice.index]
            trace.smallest_activation = min(trace.smallest_activation, float(chosen.abs().min()))
        return sigma_moe(x, choice, experts, **options)

    # MoA calls it by this name, SwitchHead and sigma-MoE by `route_handing_on`, which calls it in its own module.
    model.attention.moa.route = model.kernels.ops.route.route = measured
    model.feedforward.sigma_moe.sigma_moe = measured_experts
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step) * group["ratio"]
            if step % max(1, reader.num_windows // config.batch.global_sequences) == 0:
                for _, memory in layer_memories(network):
                    memory.forget()
            losses = []
            counters = {}
            for name, statistics in routing_statistics(network):
                statistics.choices = counters[name] = Counter(statistics.shape, config.model.sequence_length)
            for micro_step in range(stream.micro_steps):
                batch = stream.batch(step * config.batch.global_sequences, micro_step)
                objective, sequence_loss, _ = network(*batch.model_inputs())
                (objective / stream.micro_steps).backward()
                losses.append(float(sequence_loss.mean()))
            trace.loads.append({name: counter.load for name, counter in counters.items()})
            for _, statistics in routing_statistics(network):
                statistics.finish_step()
            for _, memory in layer_memories(network):
                memory.advance()
            if step in gradient_steps:
                trace.gradients[step] = {n: gradient_of(p).clone() for n, p in network.named_parameters()}
            # In fp64, as the engine: torch's fp32 norm on the CPU is off by 3e-5, enough to decide another activation.
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(gradient_of(p).double()) for p in network.parameters()])
            )
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), config.optimizer.clip_norm, norm.float())
            trace.losses.append(sum(losses) / len(losses))
            trace.grad_norms.append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.attention.moa.route = model.kernels.ops.route.route = original
        model.feedforward.sigma_moe.sigma_moe = sigma_moe
    heads = sum(math.prod(statistics.shape[:-1]) for _, statistics in routing_statistics(network))
    assert measured_heads == heads * stream.micro_steps * steps, "some router chose without being measured"
    return trace


def gradient_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||g - g_ref|| / ||g_ref||, absolute where the norm is below 1e-8."""
    norm = float(reference.norm())
    error = float((value - reference).norm())
    return error / norm if norm > 1e-8 else error


def assert_same(trace: Trace, reference: Trace, label: str) -> None:
    """Losses and gradient norms of every step, and the gradient of every parameter, to TOLERANCE; the choices of every
    router exactly, however often a layout computes, divides or repeats them."""
    assert reference.smallest_margin > 1e-5, (
        f"a routing choice is decided by {reference.smallest_margin}: choose a seed"
    )
    assert len(trace.losses) == len(reference.losses) > 1
    for step in range(len(reference.losses)):
        assert trace.losses[step] == pytest.approx(reference.losses[step], rel=TOLERANCE), (
            f"{label}: loss of step {step}"
        )
        norm, expected = trace.grad_norms[step], reference.grad_norms[step]
        assert norm == pytest.approx(expected, rel=TOLERANCE), f"{label}: gradient norm of step {step}"
        assert trace.loads[step].keys() == reference.loads[step].keys()
        for name, load in reference.loads[step].items():
            counted = trace.loads[step][name]
            assert torch.equal(counted, load.double()), f"{label}: choices that {name} counts at step {step}"
    for step, gradients in reference.gradients.items():
        assert gradients.keys() == trace.gradients[step].keys()
        for name, expected_gradient in gradients.items():
            error = gradient_error(trace.gradients[step][name], expected_gradient)
            if expected_gradient.numel() == 1:
                # The learned scale: one number, a difference of large sums. Measured by the gradient it is part of.
                error *= float(expected_gradient.abs()) / reference.grad_norms[step]
            nearest = f"a ReLU was at {reference.smallest_activation:.0e} from its kink"
            assert error < TOLERANCE, f"{label}: gradient of {name} at step {step} is off by {error:.1e}; {nearest}"


def assert_near(trace: Trace, reference: Trace, label: str) -> None:
    """Of bf16, which is not fp32."""
    assert trace.losses != reference.losses, label
    assert trace.losses == pytest.approx(reference.losses, rel=2e-2), label
    assert trace.grad_norms[:3] == pytest.approx(reference.grad_norms[:3], rel=0.05), label


def train_runs(rank: int, runs: list[tuple[Config, Path]]) -> None:
    """Trains each configuration to its end, or to its stop, in the given run folder."""
    for config, run_dir in runs:
        train(config, Sources.load(config), run_dir, torch.device("cpu"))


def events(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """Lines of events.jsonl: those of a kind, or all."""
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in ("", row["event"])]


def train_and_keep_output(rank: int, runs: list[tuple[Config, Path]], output: Path) -> None:
    """`train_runs` with what it prints in a file: the process that forks the ranks may be older than a capture."""
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        train_runs(rank, runs)


def with_a_stop(config: Config, folder: Path, after: int = 3) -> list[tuple[Config, Path]]:
    """Runs: to the end at once in `unbroken`, with a stop and another start in `resumed`."""
    stopped = config.replaced("train", stop_after_steps=after)
    return [(config, folder / "unbroken"), (stopped, folder / "resumed"), (config, folder / "resumed")]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(run_dir: Path, reference: Path) -> None:
    """Those of every step, to TOLERANCE."""
    for ours, theirs in zip(metrics(run_dir), metrics(reference), strict=True):
        for key in (*COMPARED, *(key for key in ROUTING if key in theirs)):
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE), f"{run_dir}: {key} of step {ours['step']}"


def curve(run_dir: Path) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in COMPARED) for line in metrics(run_dir)]


def state_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = list_checkpoints(run_dir / "checkpoints")[-1]
    return {f"{file.name}/{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_bit_identical(resumed: Path, unbroken: Path) -> None:
    assert curve(resumed) == curve(unbroken)
    ours, theirs = state_tensors(resumed), state_tensors(unbroken)
    assert ours.keys() == theirs.keys()
    last = json.loads((unbroken / "config.json").read_text())["model"]["num_layers"] - 1
    assert any(f"master/blocks.{last}.feedforward." in key for key in ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
