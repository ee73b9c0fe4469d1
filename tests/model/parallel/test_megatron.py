"""megatron-core at our border (model/parallel/megatron_core.py): its modules with their own parameters give what our
layers give, forward and backward; its silent fault is there and cannot pass; who has no group needs nothing of it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.kernels.choice import Backends
from model.layers import Embedding, Head
from model.parallel.collectives import enter_shards, leave_shards
from model.parallel.context import DIMENSIONS, ParallelContext
from model.parallel.regions import enter_region, leave_region
from pretrain.parallel.groups import process_groups
from tests.harness import run_ranks
from tests.tensors import gradient_of

B, T, D, V, WIDTH = 3, 6, 10, 14, 8


def full(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(rank: int, sequence_parallel: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (ours, megatron-core's) of outputs and gradients on this rank of two."""
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

    torch.cuda.current_device = partial(torch.device, "cpu")  # type: ignore[assignment]  # what its layers ask for
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = process_groups(pipeline=1, data=1, tensor=2).tensor
    parallel = ParallelContext(tensor_rank=rank, tensor_size=2, tensor_group=group, sequence_parallel=sequence_parallel)
    theirs: Any = ModelParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    found: dict[str, tuple[Tensor, Tensor]] = {}

    # Two layers of a feed-forward: megatron-core has the sequence first.
    up, down = full(1, WIDTH, D).chunk(2)[rank], full(2, D, WIDTH).chunk(2, dim=1)[rank]
    own = slice(rank * T // 2, (rank + 1) * T // 2) if sequence_parallel else slice(None)
    x, towards = full(3, B, T, D)[:, own], full(4, B, T, D)[:, own]
    ours_x, ours_up, ours_down = (t.clone().requires_grad_() for t in (x, up, down))
    y = leave_region(F.relu(enter_region(ours_x, parallel) @ ours_up.t()) @ ours_down.t(), parallel)
    y.backward(towards)
    column = tensor_parallel.ColumnParallelLinear(
        D, WIDTH, config=theirs, init_method=lambda w: w, bias=False, gather_output=False
    )
    row = tensor_parallel.RowParallelLinear(
        WIDTH, D, config=theirs, init_method=lambda w: w, bias=False, input_is_parallel=True, skip_bias_add=True
    )
    column.weight.data.copy_(up)
    row.weight.data.copy_(down)
    their_x = x.transpose(0, 1).contiguous().requires_grad_()
    z = row(F.relu(column(their_x)[0]))[0]
    z.backward(towards.transpose(0, 1).contiguous())
    found["layers"] = (y, z.transpose(0, 1))
    found["gradient of x"] = (gradient_of(ours_x), gradient_of(their_x).transpose(0, 1))
    found["gradient of up"] = (gradient_of(ours_up), column.weight.grad)
    found["gradient of down"] = (gradient_of(ours_down), row.weight.grad)

    # Embedding, output layer and cross-entropy.
    config = ModelConfig.model_validate({"d_model": D, "num_layers": 1, "vocab_size": V, "sequence_length": T})
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(6))
    table, output = full(7, V, D).chunk(2)[rank], full(8, V, D).chunk(2)[rank]
    embedding = Embedding(config, parallel=parallel, backends=Backends(), seed=0)
    head = Head(config, parallel=parallel, backends=Backends(), seed=0)
    embedding.weight.data.copy_(table)
    head.weight.data.copy_(output)
    head.bias.data.zero_()
    index = torch.arange(B)
    hidden = embedding((tokens, index))[0]
    loss = head((hidden, index, torch.zeros(())), targets)[0]
    loss.backward()
    word = tensor_parallel.VocabParallelEmbedding(
        V, D, init_method=lambda w: w, config=theirs, reduce_scatter_embeddings=sequence_parallel
    )
    word.weight.data.copy_(table)
    last = tensor_parallel.ColumnParallelLinear(
        D, V, config=theirs, init_method=lambda w: w, bias=False, gather_output=False
    )
    last.weight.data.copy_(output)
    their_hidden = word(tokens)
    if not sequence_parallel:
        their_hidden = their_hidden.transpose(0, 1).contiguous()
    logits = last(their_hidden)[0]
    their_loss = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.t().contiguous()).mean()
    their_loss.backward()
    found["embedding"] = (hidden, their_hidden.transpose(0, 1))
    found["loss"] = (loss, their_loss)
    found["gradient of the embedding"] = (gradient_of(embedding.weight), word.weight.grad)
    found["gradient of the output layer"] = (gradient_of(head.weight), last.weight.grad)
    return {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in found.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers(sequence_parallel: bool) -> None:
    for rank, pairs in enumerate(run_ranks(compare, 2, sequence_parallel)):
        assert len(pairs) == 8
        for name, (ours, theirs) in pairs.items():
            assert torch.allclose(ours, theirs, rtol=2e-6, atol=2e-6), f"rank {rank}: {name}"


def groups(rank: int) -> list[tuple[list[int], list[int]]]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    ours = process_groups(pipeline=2, data=2, tensor=2)
    theirs = {
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
    }
    found = [
        (dist.get_process_group_ranks(getattr(ours, name)), dist.get_process_group_ranks(theirs[name]))
        for name in DIMENSIONS
    ]
    dist.barrier()
    return found


@pytest.mark.parametrize("backend, where", [("nccl", 3), ("gloo", torch.device("cpu")), ("fake", torch.device("cpu"))])
def test_megatron_core_allocates_where_ranks_speak_whatever_gpus_the_machine_has(
    backend: str, where: torch.device | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on CPUs, and a rehearsal, begin on machines with GPUs too."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    import model.parallel.megatron_core  # noqa: F401  # it sets what megatron-core sees

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert mappings.torch.cuda.current_device() == where
    assert mappings.torch.empty is torch.empty


def test_its_advice_on_gpus_is_not_given_by_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.parallel.megatron_core import column_linear

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    group: Any = object()  # which a product without a gradient does not ask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = column_linear(full(1, 2, D), full(2, V, D), group)
    torch.testing.assert_close(found, full(1, 2, D) @ full(2, V, D).t())


def test_a_cuda_toolkit_without_a_gpu_is_no_news() -> None:
    """Which torch says once a rank; what else it says of extensions is heard."""
    import_module("model.parallel.megatron_core")
    logger, heard = logging.getLogger("torch.utils.cpp_extension"), list[str]()

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listening = Listening()
    logger.addHandler(listening)
    try:
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
        logger.warning("another fault")
    finally:
        logger.removeHandler(listening)
    assert heard == ["another fault"]


@pytest.mark.slow
def test_groups_are_those_of_parallel_state() -> None:
    for pairs in run_ranks(groups, 8):
        for ours, theirs in pairs:
            assert ours == theirs


def sums(rank: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of a value and of a gradient that are not contiguous: megatron-core's result, ours, and the sum over ranks."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    group = dist.group.WORLD
    x = full(rank, T, D).t()
    total = (full(0, T, D) + full(1, T, D)).t()
    theirs = mappings.reduce_from_tensor_model_parallel_region(x.clone(), group=group)
    found = {"value": (theirs, leave_shards(x, group), total)}
    grads = []
    for enter in (mappings.copy_to_tensor_model_parallel_region, enter_shards):
        leaf = torch.zeros(D, T, requires_grad=True)
        enter(leaf, group=group).backward(x)
        assert leaf.grad is not None
        grads.append(leaf.grad)
    found["gradient"] = (grads[0], grads[1], total)
    return found


def test_a_tensor_that_is_not_contiguous_is_summed_by_ours_and_not_by_megatron_core() -> None:
    for rank, found in enumerate(run_ranks(sums, 2)):
        for name, (theirs, ours, total) in found.items():
            assert torch.allclose(ours, total), f"{name} of rank {rank}: the guard does not hold"
            assert torch.equal(theirs, full(rank, T, D).t()), (
                f"{name}: megatron-core no longer returns the unsummed tensor: our guard may go"
            )


def loss_of_shards(rank: int) -> None:
    """What goes in stays as it is, and a second backward pass gives what the first gave: megatron-core's arithmetic
    works in place. So it is with the tokens of one sequence, which a transposition does not copy."""
    import torch.distributed as dist

    from model.parallel.megatron_core import cross_entropy, scatter_tokens

    group, parts = dist.group.WORLD, [full(part, T, V // 2) for part in (0, 1)]
    assert group is not None
    targets = torch.tensor([0, V - 1, 3, V // 2, V // 2 - 1, 9])
    logits, whole = parts[rank].clone().requires_grad_(), torch.cat(parts, 1).requires_grad_()
    loss = cross_entropy(logits, targets, first=rank * V // 2, group=group)
    expected = F.cross_entropy(whole, targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits, parts[rank])
    (reference,) = torch.autograd.grad(expected.sum(), whole)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, reference.chunk(2, 1)[rank])
    tokens = full(rank, 1, T, D)
    found = scatter_tokens(tokens, group)
    torch.testing.assert_close(found, (full(0, 1, T, D) + full(1, 1, T, D)).chunk(2, 1)[rank])
    assert torch.equal(tokens, full(rank, 1, T, D))


def test_a_loss_of_shards_changes_nothing_that_it_is_given() -> None:
    run_ranks(loss_of_shards, 2)


WITHOUT = """
import sys

class Blocked:
    names = {"megatron", "deepspeed", "pydantic"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import importlib, pkgutil
import model.kernels.backend, model.kernels.cpu, model.kernels.ops
for package in (model.kernels.cpu, model.kernels.ops):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
Blocked.names = {"megatron"}
import torch
from model.config import ModelConfig
from model.language_model import build_model
import pretrain.parallel.groups
config = ModelConfig.model_validate({"d_model": 8, "num_layers": 1, "vocab_size": 16, "sequence_length": 4})
tokens = torch.arange(8).view(2, 4)
build_model(config, seed=0)(tokens, tokens, torch.arange(2))[0].backward()
print("ran without")
"""


def test_kernels_need_torch_alone_and_one_process_needs_nothing_of_megatron_core() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "ran without\n", done.stderr


def test_no_other_file_imports_it() -> None:
    root = Path(__file__).resolve().parents[3]
    found = [
        str(file.relative_to(root))
        for folder in ("model", "pretrain", "launch", "data_prep", "common")
        for file in sorted((root / folder).rglob("*.py"))
        if re.search(r"^\s*(from|import) megatron\b", file.read_text(), re.MULTILINE)
    ]
    assert found == ["model/parallel/megatron_core.py"]
