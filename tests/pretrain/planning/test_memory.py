"""The memory estimate beside what a CPU's allocator counts, and beside the tensors that autograd saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.costs import formula_parameters
from model.kernels.choice import Backends
from model.language_model import LanguageModel
from model.memory import layer_memories
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.planning import memory
from pretrain.planning.gradients import Gradients
from pretrain.planning.memory import Fit, MemoryEstimate, estimate, largest_micro_batch, why_unknown
from pretrain.planning.traced import Activations, TracedRun, traced
from pretrain.report.memory_text import memory_rows
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.matrix import MODELS, dropouts
from tests.pretrain.runs import one_step, small_config, trainer_of

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"

# ---------------------------------------------------------------------------------------- activations, by what is saved


def saved_bytes(config: Config) -> int:
    """Bytes of all different storages that autograd keeps of a forward pass, without parameters."""
    model_config = config.model
    backends = Backends.choose("auto", model_config, device_type="cpu", dtype=torch.float32)
    model = LanguageModel(model_config, backends=backends)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    index = torch.arange(2)
    tokens = torch.zeros(2, model_config.sequence_length, dtype=torch.int64)
    size = 2, model_config.memory_length, model_config.d_model
    for _, layer_memory in layer_memories(model):
        layer_memory.assign(index, 2)
        layer_memory.place(torch.zeros(size), torch.zeros(size))
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), tokens, index)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective, *_ = model(tokens, tokens, index)
        assert objective.requires_grad
    return sum(found.values())


SLOW_MODELS = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "switchall"]


@pytest.mark.parametrize("name", ["switchall", *SLOW_MODELS])
def test_what_is_traced_is_what_autograd_saves(prepared: Path, name: str) -> None:
    config = small_config(prepared, *MODELS[name], *dropouts(name), "model.d_model=48", "model.sequence_length=32")
    backends = Backends.choose("auto", config.model, device_type="cpu", dtype=torch.float32)
    found = traced(TracedRun(config.model, 2, "none", backends, torch.float32, False))
    assert found.kept == pytest.approx(saved_bytes(config), rel=0.05)
    assert found.peak > found.kept > 3 * found.of_a_layer > 0
    less = traced(TracedRun(config.model, 2, "full", backends, torch.float32, False))
    a_state = 2 * 32 * 48 * 4
    # Which each layer of Transformer-XL makes once, for the distances of a chunk and its memory.
    sinusoids = (32 + config.model.memory_length) * 48 * 4 if config.model.position.type == "xl" else 0
    assert a_state <= less.of_a_layer - sinusoids < 2 * a_state, "a block keeps its input alone"


def test_documents_cost_a_mask_in_the_reference_alone(prepared: Path) -> None:
    """On CUDA in half precision: two numbers a token, and the softmax's sum of each query and head."""
    overrides = ("data.document_mask=true", "train.precision=bf16", "model.sequence_length=64")
    config = small_config(prepared, *overrides)
    layers, B, T, H = config.model.num_layers, 2, 64, config.model.attention.num_heads
    chosen = Backends.choose("auto", config.model, device_type="cuda", dtype=torch.bfloat16, document_mask=True)
    kept = {}
    for backend in (chosen.causal_attention, "reference"):
        backends = replace(chosen, causal_attention=backend)
        kept[backend] = [
            traced(TracedRun(config.model, B, "none", backends, torch.bfloat16, documents)).kept
            for documents in (False, True)
        ]
    without, with_documents = kept["triton"]
    tables = B * T * 2 * 4 * config.model.attention.head_dim * layers  # of RoPE, of each sequence, at most
    assert with_documents - without <= 3 * 8 * B * T + tables + layers * 4 * B * H * T
    assert kept["reference"][1] - with_documents > layers * B * T * T


# ------------------------------------------------------------------------------------ a rank, by the allocator's counts


class Measured(NamedTuple):
    resting: int
    """Weights, master weights and moments after the first step, by their storages."""
    total: int
    """And what the allocator counted above that at the highest point of a later step."""


def measured(rank: int, configs: list[Config]) -> list[Measured]:
    found = []
    for config in configs:
        trainer = trainer_of(config)
        one_step(trainer, Progress(0, 0))
        resting = _resting(trainer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            one_step(trainer, Progress(1, config.batch.global_sequences))
        found.append(Measured(resting, resting + _highest(profiler)))
        trainer.close()
    return found


def _resting(trainer: Trainer) -> int:
    engine: Any = trainer.engine
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [*engine.module.parameters(), *(p for group in inner.param_groups for p in group["params"])]
    tensors += [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
    for _, layer_memory in layer_memories(engine.module):
        tensors += [layer_memory.kept] * 2 if layer_memory.kept is not None else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _highest(profiler: Any) -> int:
    """Bytes above the beginning: every allocation and every release, in order."""
    events = profiler.profiler.kineto_results.events()
    now = highest = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        highest = max(highest, now)
    return highest


SIZES = (
    "model.d_model=96",
    "model.num_layers=3",
    "model.sequence_length=64",
    "batch.micro_sequences=2",
    "model.attention.head_dim=24",
    "model.feedforward.expert_size=48",
)
BUCKETS = "deepspeed.zero_optimization.reduce_bucket_size=200000"
"""Elements. DeepSpeed's own 500 million would be larger than all else."""
DENSE = (
    'model.attention={"type": "dense", "num_heads": 4, "head_dim": 24}',
    'model.feedforward={"type": "dense", "hidden_size": 384}',
)
XL = ("model.position.type=xl",)
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "bf16": (1, ("train.precision=bf16",)),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 0": (1, ("parallel.zero=0",)),
    "recomputed": (1, ("train.recompute=full",)),
    "one micro-step": (1, ("batch.micro_sequences=8",)),
    "memory": (1, XL),
    "dense, ZeRO 2 in bf16": (2, (*DENSE, "parallel.zero=2", "train.precision=bf16")),
    "selective": (2, ("train.recompute=selective",)),
}


def check(prepared: Path, ranks: int) -> None:
    names = [name for name, (wanted, _) in CASES.items() if wanted == ranks]
    configs = [small_config(prepared, *SIZES, *CASES[name][1], *[BUCKETS] * (name != "ZeRO 0")) for name in names]
    failed = []
    of_ranks = zip(*run_ranks(measured, ranks, configs), strict=True)
    for name, config, each in zip(names, configs, of_ranks, strict=True):
        found = max(each, key=lambda rank: rank.total)
        expected = estimate(config, ranks, "cpu")
        rest, total = expected.resting / found.resting, expected.total / found.total
        print(f"{name}: between steps {rest:.3f}, highest {total:.3f} of {found.total:,}; {expected}")
        failed += [name] * (abs(rest - 1) > 0.1 or abs(total - 1) > 0.15)
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_estimate_is_what_the_allocator_counts(prepared: Path, ranks: int) -> None:
    """In every kind of run. Weights and optimizer are held by test_layout.py in parallel/, activations by
    test_what_is_traced_is_what_autograd_saves."""
    check(prepared, ranks)


# ------------------------------------------------------------------------------------------------ the largest that fits


def given(micro_steps: int, per_sequence: int, sequences: int) -> MemoryEstimate:
    peak = per_sequence * sequences
    sums = 50 if micro_steps > 1 else 0
    return MemoryEstimate(
        weights=100, optimizer=0, memory=0, activations=Activations(0, 0, peak, peak, peak, peak, 0),
        gradients=Gradients(sums, sums, sums, sums, 0, 0, 50 - sums, 50, 0),
    )  # fmt: skip


def test_the_largest_micro_batch_fits_and_the_next_does_not(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(prepared, "batch.global_sequences=24")
    asked = []

    def fake(config: Config, data_size: int, device: str, *, micro_sequences: int) -> MemoryEstimate:
        asked.append(micro_sequences)
        return given(2, 10, micro_sequences)

    monkeypatch.setattr(memory, "estimate", fake)
    assert largest_micro_batch(config, 2, "cpu", 300) == Fit(300, 12, 270, None, None)
    assert largest_micro_batch(config, 2, "cpu", 299) == Fit(299, 6, 210, 12, 270)
    assert largest_micro_batch(config, 2, "cpu", 177) == Fit(177, None, 160, 1, 160)
    assert set(asked) <= {1, 2, 3, 4, 6, 12}, "micro-batches divide a rank's share of a step"
    one_step = given(1, 10, 12)  # 220, less than two micro-steps of 7 would take: those have sums

    def at_once(config: Config, data_size: int, device: str, *, micro_sequences: int) -> MemoryEstimate:
        return one_step if micro_sequences == 12 else given(2, 25, micro_sequences)

    monkeypatch.setattr(memory, "estimate", at_once)
    assert largest_micro_batch(config, 2, "cpu", 245) == Fit(245, 12, 220, None, None)


def test_gradients_wait_for_the_second_micro_step() -> None:
    assert given(1, 10, 4).total == 150 and given(2, 10, 4).total == 190


@pytest.mark.parametrize(
    "changed, highest",
    [
        ({}, 40 + (45 + 10) - 2 * 7),  # a bucket is reduced, when two blocks have given back what they kept
        ({"passed": 0}, 40 + (45 + 10)),
        ({"joined": 2}, 40 + 50 - 2 * 7),
        ({"coming": 1}, 3 + 50),  # the first gradients come
        ({"at_loss": 90}, 90 + 30),  # none is there yet
        ({"afterwards": 200}, 200),
        ({"coming": 0, "stay": 30}, 60),  # nothing is reduced before the end: while they come
        ({"coming": 0, "stay": 45}, 45 + 20),  # at the end
    ],
)
def test_the_highest_point_of_a_step(changed: dict[str, int], highest: int) -> None:
    activations = Activations(
        kept=28, of_a_layer=7, at_loss=30, later=50, at_a_gradient=45, with_gradients=60, at_the_end=20
    )
    held = {"between": 0, "at_loss": 5, "first": 3, "coming": 40, "passed": 2, "joined": 10, "stay": 0, "buckets": 0}
    of_step = Gradients(**{**held, "afterwards": 0, **changed})
    found = MemoryEstimate(weights=100, optimizer=200, memory=300, activations=activations, gradients=of_step)
    assert found.total == 600 + highest


def test_the_1b_model_on_its_eight_gpus() -> None:
    """The sum of docs/parallelism.md, and activations that fit 80 GiB with the file's micro-batch or recomputation."""
    config = load_config(ONE_BILLION, ["train.recompute=full"])
    found = estimate(config, 8, "cpu")
    parts = found.gradients._asdict()
    gib = {name: getattr(found, name) / 2**30 for name in ("weights", "optimizer")}
    gib |= {name: parts[name] / 2**30 for name in ("between", "buckets")}
    assert gib == pytest.approx({"weights": 2.08, "optimizer": 1.56, "between": 4.16, "buckets": 0.37}, abs=0.01)
    a_state = 8 * 2048 * 2048 * 2
    assert a_state <= found.activations.of_a_layer < 1.1 * a_state


@pytest.mark.slow  # the fast one: test_cuda_graphs_which_no_rehearsal_has_are_added_up in preflight/test_step.py
def test_graphs_keep_activations_and_a_copy_of_the_gradients_for_each_kind() -> None:
    """On an H200 this run took 29.4 GiB of tensors at its peak, and its graphs hold theirs in the update too."""
    keys = ["batch.global_sequences=32", "batch.micro_sequences=8"]
    with_graphs, without = (
        estimate(load_config(ONE_BILLION, [*keys, f"train.cuda_graph={key}"]), 1, "cuda") for key in ("auto", "off")
    )
    parameters = formula_parameters(load_config(ONE_BILLION).model).total
    assert with_graphs.graphs == 2 * parameters and without.graphs == 0
    assert with_graphs.activations == without.activations
    held = with_graphs.resting + with_graphs.graphs + with_graphs.activations.peak
    assert with_graphs.total == held + with_graphs.gradients.afterwards
    found = held + 4 * parameters  # in a micro-step; in the update the tensors inside the graphs were not counted
    assert 29.4 < found / 2**30 < 1.1 * 29.4
    assert estimate(load_config(ONE_BILLION, keys), 1, "cpu").graphs == 0
    memory = 'model.position={"type": "rope", "memory_chunks": 2}'  # of 0, 1 and 2 chunks: three kinds
    assert estimate(load_config(ONE_BILLION, [*keys, memory]), 1, "cuda").graphs == 3 * 2 * parameters


def test_memory_is_of_all_streams_of_a_rank_and_sums_wait_for_a_second_micro_step() -> None:
    """32 sequences on four ranks: eight streams, of which two are computed at once; by hand, in bf16."""
    memory = 'model.position={"type": "rope", "memory_chunks": 1}'
    config = load_config(ONE_BILLION, [memory, "batch.global_sequences=32", "batch.micro_sequences=2"])
    found = estimate(config, 4, "cpu")
    assert found.memory == 2 * 8 * 18 * 2048 * 2048 * 2, "as it is read and as it is written"
    assert found.gradients.between > 0
    at_once = estimate(config, 4, "cpu", micro_sequences=8)
    assert at_once.gradients.between == 0 and at_once.memory == found.memory


@pytest.mark.parametrize("key", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2", "parallel.zero=3"])
def test_what_is_unknown_is_said(key: str) -> None:
    config = load_config(ONE_BILLION, [key])
    (row,) = memory_rows(config, 8, "cpu", 80 * 2**30)
    assert row.value == "not estimated" and row.formula == why_unknown(config)
    assert row.formula.startswith(key.split("=")[0])
