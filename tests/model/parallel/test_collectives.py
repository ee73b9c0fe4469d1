"""Collectives that autograd knows: values and gradients against plain tensor arithmetic, for odd shapes and strides."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from model.parallel.collectives import (
    enter_shards,
    gather_last,
    gather_tokens,
    leave_shards,
    scatter_tokens,
    sum_for_each,
)
from model.parallel.context import ParallelContext
from model.parallel.overlap import enter_overlapped, own_tokens
from model.parallel.regions import enter_region
from tests.harness import run_ranks
from tests.tensors import gradient_of

# ranks, B, chunks in a row, tokens of a chunk per rank, d
SHAPES = [(2, 3, 1, 5, 7), (2, 1, 3, 1, 1), (3, 2, 2, 3, 4), (3, 1, 1, 1, 5)]


def full(name: str, *shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(name.encode())))


def strided(x: Tensor) -> Tensor:
    """The same values with no dimension contiguous."""
    return torch.stack([x.transpose(0, -1), x.transpose(0, -1) + 1], dim=-1)[..., 0].transpose(0, -1)


def rank_tokens(x: Tensor, rank: int, size: int, chunk: int) -> Tensor:
    """By index arithmetic, token for token."""
    place = torch.arange(x.shape[1])
    return x[:, place // chunk % size == rank]


def collectives(rank: int) -> None:
    for sequence_parallel in (False, True):
        cross_entropy_of_shards(rank, sequence_parallel)
    for ranks, B, chunks, chunk, d in SHAPES:
        if ranks != dist.get_world_size():
            continue
        group, tokens = dist.group.WORLD, chunks * ranks * chunk
        assert group is not None
        parallel = ParallelContext(tensor_rank=rank, tensor_size=ranks, tensor_group=group, sequence_parallel=True)
        x = full("x", B, tokens, d)
        weights = [full(f"weight {r}", B, tokens, d) for r in range(ranks)]
        own = rank_tokens(x, rank, ranks, chunk)
        assert torch.equal(own_tokens(x, rank=rank, size=ranks, chunk=chunk), own)

        # A rank's gradient is its share of what all ranks computed from its tokens.
        expected = rank_tokens(torch.stack(weights).sum(0), rank, ranks, chunk)
        for is_plain in (False, True) if chunks == 1 else (False,):
            local = strided(own).requires_grad_()
            before = local.detach().clone()
            whole = gather_tokens(local, group) if is_plain else enter_overlapped(local, parallel, chunk=chunk)[0]
            assert torch.equal(whole, x)
            grad = strided(weights[rank])
            kept = grad.clone()
            whole.backward(grad)
            torch.testing.assert_close(local.grad, expected)
            assert torch.equal(local, before) and torch.equal(grad, kept), "an input was modified"

        # The second output's gradient, the same on every rank, counts once.
        alike = full("alike", B, tokens, d)
        for uses in ((True, True), (True, False), (False, True)):
            local = strided(own).requires_grad_()
            outputs = enter_overlapped(local, parallel, chunk=chunk)[:2]
            assert all(torch.equal(output, x) for output in outputs)
            factors = (strided(weights[rank]), strided(alike))
            torch.stack(
                [(o * f).sum() for o, f, used in zip(outputs, factors, uses, strict=True) if used]
            ).sum().backward()
            wanted = sum(
                part * used for part, used in zip((expected, rank_tokens(alike, rank, ranks, chunk)), uses, strict=True)
            )
            torch.testing.assert_close(local.grad, wanted)

        # Partial results: every rank keeps its tokens of the sum; chunks are not divided here.
        partial = strided(weights[rank]).requires_grad_()
        before = partial.detach().clone()
        kept_tokens = scatter_tokens(partial, group)
        torch.testing.assert_close(kept_tokens, rank_tokens(torch.stack(weights).sum(0), rank, ranks, chunks * chunk))
        kept_tokens.backward(strided(rank_tokens(alike, rank, ranks, chunks * chunk)))
        assert torch.equal(gradient_of(partial), alike) and torch.equal(partial, before)
        whole_tensors(rank, group, [strided(w) for w in weights], strided(alike))


def whole_tensors(rank: int, group: dist.ProcessGroup, parts: list[Tensor], alike: Tensor) -> None:
    """What is not divided by tokens; nothing that goes in is contiguous, and nothing is modified."""
    x, grad = alike.requires_grad_(), parts[rank].clone(memory_format=torch.preserve_format)
    enter_shards(x, group).backward(grad)
    torch.testing.assert_close(x.grad, torch.stack(parts).sum(0))
    assert torch.equal(grad, parts[rank])
    partial = parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
    total = leave_shards(partial, group)
    torch.testing.assert_close(total, torch.stack(parts).sum(0))
    total.backward(alike.detach())
    assert torch.equal(gradient_of(partial), alike) and torch.equal(partial, parts[rank])
    partial.grad = None
    together = gather_last(partial, group)
    assert torch.equal(together, torch.cat(parts, -1))
    together.backward(torch.cat([(i + 1.0) * alike.detach() for i in range(len(parts))], -1))
    assert torch.equal(gradient_of(partial), (rank + 1.0) * alike)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_tokens_are_gathered_and_scattered(ranks: int) -> None:
    """And classes divided, in the cross-entropy of such tokens."""
    run_ranks(collectives, ranks)


def sums_for_each(rank: int) -> None:
    """Terms of a mean over ranks, of each of which every rank makes a loss of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ours calls nothing that torch deprecates
        sums_of(rank, sum_for_each, {})
    ours, theirs = dict[str, Tensor](), dict[str, Tensor]()
    sums_of(rank, sum_for_each, ours)
    sums_of(rank, all_reduce_of_torch, theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), f"{name}: another bit than torch's"


def all_reduce_of_torch(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The function that torch 2.13 deprecates, with the same meaning."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x, group=group)


def sums_of(rank: int, sum_over: Any, found: dict[str, Tensor]) -> None:
    """Puts values and gradients, first and second ones, into `found`; the gradients are checked by arithmetic."""
    ranks, group = dist.get_world_size(), dist.group.WORLD
    for dtype in (torch.float32, torch.float64):
        for shape in ((5,), (3, 7), (1, 1), (4, 3, 2)):
            parts = [strided(full(f"part {r}", *shape).to(dtype)) for r in range(ranks)]
            weights = [strided(full(f"weight {r}", *shape).to(dtype)) for r in range(ranks)]
            x = parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
            total = sum_over(x, group)
            torch.testing.assert_close(total.detach(), torch.stack(parts).sum(0))
            loss = (weights[rank] * total.square()).sum()
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            slopes = torch.stack(weights).sum(0)
            torch.testing.assert_close(first.detach(), 2 * slopes * torch.stack(parts).sum(0))
            (second,) = torch.autograd.grad(first.sum(), x)  # of all ranks' sums of first gradients
            torch.testing.assert_close(second, 2 * ranks * slopes)
            (even,) = torch.autograd.grad(sum_over(x, group).mean(), x)  # an expanded gradient comes back
            torch.testing.assert_close(even, torch.full_like(even, ranks / x.numel()))
            assert torch.equal(x, parts[rank]), "the input was modified"
            found |= {
                f"{what} {dtype} {shape}": t for what, t in (("sum", total), ("first", first), ("second", second))
            }


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sum_of_which_every_rank_makes_a_loss_is_torchs_bit_for_bit(ranks: int) -> None:
    run_ranks(sums_for_each, ranks)


def test_without_a_group_nothing_happens() -> None:
    x = full("x", 2, 3, 4)
    assert gather_tokens(x, None) is x and scatter_tokens(x, None) is x
    assert enter_shards(x, None) is x and leave_shards(x, None) is x and gather_last(x, None) is x
    assert sum_for_each(x, None) is x
    divided, alike, late = enter_overlapped(x, ParallelContext(), (x,))
    assert divided is x and alike is x and late == [((x,), None)]


def cross_entropy_of_shards(rank: int, sequence_parallel: bool) -> None:
    size, (B, T, d, V) = dist.get_world_size(), (2, 6, 5, 12)
    group = dist.group.WORLD
    parallel = ParallelContext(
        tensor_rank=rank, tensor_size=size, tensor_group=group, sequence_parallel=sequence_parallel
    )
    hidden, weight, bias = full("hidden", B, T, d), full("weight", V, d), full("bias", V)
    targets = torch.arange(B * T) * 5 % V
    targets[3] = -100
    plain = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    expected = torch.nn.functional.cross_entropy(
        (plain[0] @ plain[1].t() + plain[2]).flatten(0, 1), targets, ignore_index=-100
    )
    expected.backward()
    classes = parallel.slice_of(V)
    for backend in ("reference", "cpu"):
        local = rank_tokens(hidden, rank, size, T // size) if sequence_parallel else hidden
        leaves = [t.clone().requires_grad_() for t in (local, weight[classes], bias[classes])]
        entered = enter_region(leaves[0], parallel).flatten(0, 1)
        loss, _ = linear_cross_entropy(entered, leaves[1], leaves[2], targets, backend=backend, parallel=parallel)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        grad_hidden = plain[0].grad
        assert grad_hidden is not None and plain[1].grad is not None and plain[2].grad is not None
        own = rank_tokens(grad_hidden, rank, size, T // size) if sequence_parallel else grad_hidden
        for leaf, wanted in zip(leaves, (own, plain[1].grad[classes], plain[2].grad[classes]), strict=True):
            torch.testing.assert_close(leaf.grad, wanted)
