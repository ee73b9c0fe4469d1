"""SwitchHead as GEMMs over all experts (backend `dense`), the Triton kernels interpreted: chunks of tokens, copies, the
rows between the GEMMs and their bytes. That its results are those of the fp64 loops is in test_switchhead.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from benchmarks.kernel_cases.recording import recording
from benchmarks.launch_counter import LaunchCounter
from model.kernels.dense import gemms, plain_rows, switchhead_output, switchhead_value
from model.kernels.ops.route import Choice
from model.kernels.ops.switchhead import Inputs
from model.kernels.triton import gated_rows
from tests.model.kernels.test_switchhead import OUTPUT, VALUE, Op, Shape, both_ops, computed, gradient, inputs, run
from tests.model.kernels.triton.small_tiles import use_tiles
from tests.model.kernels.triton.test_switchhead import FUSED, assert_equals_loop

SMALL = FUSED.small


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ops
def test_chunks_of_tokens(op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 tokens, the last one short. Each fills its own part of every result."""
    monkeypatch.setattr(gemms, "CHUNK_BYTES", 8 * SMALL.H * SMALL.E * SMALL.h * dtype.itemsize)
    assert_equals_loop(op, FUSED, SMALL, dtype)


def copies(shape: Shape, op: Op, compute: Callable[[Inputs, Tensor, Tensor], Any]) -> Counter[str]:
    """What `compute` copies of the inputs of a call and of its result, given the products that value keeps. The choices
    are those of some heads that were routed together with others, as value's and output's are."""
    N, _, H, h, E, k, _ = shape
    with fake_cuda(), torch.device("cuda"), LaunchCounter() as counter:
        scores, index = (torch.empty(N, 2 * H, k, dtype=kind)[:, H:] for kind in (torch.float32, torch.int64))
        sizes = op.rows(shape), op.experts(shape), op.result(shape), (N * H * k, h)
        rows, experts, result, kept = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        order, load = (torch.empty(H, size, dtype=torch.int64) for size in (N * k, E))
        compute(Inputs(rows, Choice(scores, index, order, load), experts, "fused"), result, kept)
    names = {name: number for (_, name), number in counter.counts.by_operator.items()}
    assert sum(number for name, number in names.items() if name.startswith("gated_")) > 0
    return Counter({name: names[name] for name in ("clone", "_to_copy") if name in names})


def test_the_choices_of_heads_that_were_routed_together_are_not_copied() -> None:
    """But value's experts, which its products take side by side, and their gradient back."""
    value, output = switchhead_value, switchhead_output
    assert not copies(SMALL, OUTPUT, lambda inputs, result, kept: output.forward(inputs))
    assert not copies(SMALL, OUTPUT, lambda inputs, result, kept: output.backward(result, inputs, ()))
    assert copies(SMALL, VALUE, lambda inputs, result, kept: value.forward(inputs)) == {"clone": 1}
    both = copies(SMALL, VALUE, lambda inputs, result, kept: value.backward(result, inputs, (kept,)))
    assert both == {"clone": 1, "_to_copy": 1}
    # Under tensor parallelism in two parts, each of which copies what it needs itself.
    of_inputs = copies(SMALL, VALUE, lambda inputs, result, kept: value.input_gradients(result, inputs, (kept,)))
    of_experts = copies(SMALL, VALUE, lambda inputs, result, kept: value.expert_gradient(result, inputs, (kept,), None))
    assert of_inputs == {"clone": 1} and of_experts == {"_to_copy": 1}


def pairs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Products [P, E, h], scores and index [C, H, k], rows [P, h]."""
    C, H, E, h, k = 7, 3, 5, 19, 3
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(C, H, E, generator=generator).topk(k).indices
    products, rows = (torch.randn(C * H, *size, generator=generator).to(dtype) for size in ((E, h), (h,)))
    return products, torch.rand(C, H, k, generator=generator), index, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_forms_of_the_rows_agree(dtype: torch.dtype) -> None:
    """Triton's and torch's, which differ by the order of the sums over h and k alone."""
    products, scores, index, rows = pairs(dtype)
    (P, E, h), k = products.shape, index.shape[2]
    found = []
    for form in (gated_rows, plain_rows):
        mixed, chosen, gated = rows.new_empty(P, h), rows.new_empty(P, k, h), rows.new_empty(P, E, h)
        of_sum, of_spread = torch.empty_like(scores), torch.empty_like(scores)
        with recording():
            form.gated_sum(products, scores, index, mixed, chosen=chosen, dot=(rows, of_sum))
            form.gated_spread(rows, scores, index, gated, dot=(chosen, of_spread))
        found.append((mixed, chosen, gated, of_sum, of_spread))
    for name, fused, plain in zip(("mixed", "chosen", "gated", "of_sum", "of_spread"), *found, strict=True):
        if name in ("chosen", "gated"):
            assert torch.equal(fused, plain), name
        torch.testing.assert_close(fused, plain, msg=name)
    assert ((found[0][2] == 0).all(2).sum(1) == E - k).all(), "an expert that was not chosen has no zeros"


@both_ops
def test_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the parts between the GEMMs, per token: docs/kernels.md has the sum."""
    monkeypatch.undo()
    shape = N, _, H, h, E, k, _ = Shape(64, 16, 2, 64, 4, 2)
    case, upstream = inputs(op, Shape(*shape), torch.bfloat16), gradient(op, Shape(*shape), torch.bfloat16)
    with recording(check=False) as launches:
        run(computed(op, FUSED), case, upstream)
    wide, chosen, narrow = 2 * N * H * E * h, 2 * N * H * k * h, 2 * N * H * h
    stored = [{n: t.store_bytes for n, t in launch.tensors.items() if t.store_bytes} for launch in launches]
    loaded = [{n: t.load_bytes for n, t in launch.tensors.items() if t.load_bytes} for launch in launches]
    of_scores, of_index = 4 * N * H * k, 8 * N * H * k
    choices = {"scores": of_scores, "index": of_index}
    if op is VALUE:
        assert stored == [{"mixed": narrow, "chosen": chosen}, {"gated": wide, "grad_scores": of_scores}]
        assert loaded == [choices | {"products": chosen}, choices | {"rows": narrow, "chosen": chosen}]
    else:
        assert stored == [{"gated": wide}, {"mixed": narrow, "grad_scores": of_scores}, {"gated": wide}]
        assert loaded == [
            choices | {"rows": narrow},
            choices | {"products": chosen, "rows": narrow},
            choices | {"rows": narrow},
        ]
