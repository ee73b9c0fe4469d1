"""linear_cross_entropy's Triton kernel, interpreted, against sums in fp64; vocabulary shards; bytes per logit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from benchmarks.kernel_cases.recording import Launch, recording
from benchmarks.launch_counter import LaunchCounter
from model.kernels.ops import linear_cross_entropy as op
from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from model.kernels.triton import linear_cross_entropy as kernels
from model.parallel.context import ParallelContext
from tests.harness import run_ranks
from tests.model.kernels.checks import error, stored_in_reverse
from tests.model.kernels.test_linear_cross_entropy import UPSTREAM, Case, Shape, leaves, make_case, oracle

SHAPES = {
    "odd sizes, no bias": Shape(N=13, d=7, V=31, bias=False),
    "chunks of 4, the last one short": Shape(N=18, d=8, V=40, chunk=4),
    "chunks of 1": Shape(N=5, d=8, V=33, chunk=0),
    "extreme logits": Shape(N=12, d=16, V=50, scale=200.0),
    "nothing ignored": Shape(N=12, d=8, V=16, ignored=0.0),
    "all ignored": Shape(N=12, d=8, V=20, ignored=1.0, chunk=5),
    "one class": Shape(N=6, d=4, V=1),
    "one token": Shape(N=1, d=4, V=10, ignored=0.0),
    "empty": Shape(N=0, d=4, V=10),
    "several blocks": Shape(N=6, d=8, V=301, chunk=4),
    "several blocks, the last one full": Shape(N=6, d=8, V=256),
}
# The loss is computed in fp32 from exact products. Of half precision the gradient of every logit is rounded, and the
# result; a probability below 6e-8 is 0 in fp16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies above 128 are several blocks."""
    monkeypatch.setattr(kernels, "LONGEST_BLOCK", 128)
    monkeypatch.setattr(kernels, "WALKING_BLOCK", 128)


def run(case: Case) -> list[Tensor]:
    loss, token_loss = linear_cross_entropy(*case, backend="triton")
    return [loss.detach(), token_loss, *torch.autograd.grad(loss * UPSTREAM, leaves(case))]


def check(case: Case, dtype: torch.dtype) -> list[Launch]:
    """Right, the same again bit for bit, within bounds, no races and no atomics."""
    with recording() as launches:
        results = run(case)
    expected_loss, expected_token_loss, expected_grads = oracle(case)
    assert error(results[0], expected_loss) <= 1e-6
    assert error(results[1], expected_token_loss) <= 1e-6
    assert (results[1][case.targets == -100] == 0).all()
    for what, actual, expected in zip(("hidden", "weight", "bias"), results[2:], expected_grads, strict=False):
        assert actual.dtype == dtype
        assert error(actual, expected) <= TOLERANCE[dtype], what
    assert all(torch.equal(first, again) for first, again in zip(results, run(case), strict=True))
    assert not any(launch.atomics for launch in launches)
    return launches


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_oracle(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    stride, _, _ = kernels.blocks(shape.V, holds_row=False)
    monkeypatch.setattr(op, "CHUNK_BYTES", shape.chunk * stride * 4)
    launches = check(make_case(shape, dtype), dtype)
    assert len(launches) == (0 if shape.N == 0 else -(-shape.N // max(1, min(shape.chunk, shape.N))))


def test_chunks_whose_bias_gradients_cancel_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 129/256 and 127/256, by a bias of 1/64. Three tokens of the first class give it 3 (p - 1) = -381/256, three
    of the other +387/256: neither sum is a number of bf16, and each rounds by a sixth of what remains."""
    stride, _, _ = kernels.blocks(2, holds_row=False)
    monkeypatch.setattr(op, "CHUNK_BYTES", 3 * stride * 4)
    hidden, weight = (torch.zeros(*size, dtype=torch.bfloat16) for size in ((6, 1), (2, 1)))
    bias = torch.tensor([1 / 64, 0.0], dtype=torch.bfloat16)
    case = Case(hidden, weight.requires_grad_(), bias.requires_grad_(), torch.tensor([0, 0, 0, 1, 1, 1]))
    loss, _ = linear_cross_entropy(*case, backend="triton")
    _, grad = torch.autograd.grad(loss, [weight, bias])
    torch.testing.assert_close(grad.double(), torch.tensor([1.0, -1.0]).double() / 256, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("own_tiles")
@pytest.mark.parametrize("classes", [100, 8000])
def test_a_logit_is_read_once(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block holds a row: 4 bytes read and 2 written per logit; ignored rows are not read."""
    monkeypatch.undo()
    case = make_case(Shape(N=6, d=4, V=classes, ignored=0.5), torch.bfloat16)
    kept, stride = int((case.targets != -100).sum()), -(-classes // 16) * 16
    assert 0 < kept < 6
    with recording(check=False) as launches:
        linear_cross_entropy(*case, backend="triton")
    (launch,) = launches
    assert launch.tensors["logits_ptr"].load_bytes == kept * (stride + 1) * 4  # the target once more
    assert launch.tensors["gradient_ptr"].store_bytes == 6 * stride * 2


def test_strides_and_views() -> None:
    """Nothing is contiguous, and only the weight needs a gradient."""
    case = make_case(Shape(N=9, d=6, V=20), torch.float32)
    strided = Case(
        stored_in_reverse(case.hidden.detach()),
        stored_in_reverse(case.weight),
        torch.stack([case.bias.detach()] * 2, 1)[:, 0] if case.bias is not None else None,
        case.targets.repeat_interleave(2)[::2],
    )
    with recording():
        loss, _ = linear_cross_entropy(*strided, backend="triton")
    (grad,) = torch.autograd.grad(loss * UPSTREAM, [strided.weight])
    assert error(grad, oracle(case)[2][1]) <= TOLERANCE[torch.float32]


def shards(rank: int, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Errors of a rank's half of the vocabulary against the oracle of the whole, with checks on."""
    case = make_case(Shape(N=14, d=8, V=66), dtype)
    group = dist.group.WORLD
    parallel = ParallelContext(tensor_rank=rank, tensor_size=2, tensor_group=group)
    classes = parallel.slice_of(66)
    assert case.bias is not None
    local = [t.detach().requires_grad_() for t in (case.hidden, case.weight[classes], case.bias[classes])]
    hidden, weight, bias = local
    with recording() as launches:
        loss, token_loss = linear_cross_entropy(hidden, weight, bias, case.targets, backend=backend, parallel=parallel)
    assert len(launches) == (2 if backend == "triton" else 0)
    grads = torch.autograd.grad(loss * UPSTREAM, local)
    grad_hidden = grads[0].double()
    dist.all_reduce(grad_hidden, group=group)
    expected_loss, expected_token_loss, (hidden, weight, bias) = oracle(case)
    return {
        "loss": error(loss.detach(), expected_loss),
        "token_loss": error(token_loss, expected_token_loss),
        "hidden": error(grad_hidden, hidden),
        "weight": error(grads[1], weight[classes]),
        "bias": error(grads[2], bias[classes]),
    }


def both_dtypes(rank: int) -> dict[tuple[str, torch.dtype], dict[str, float]]:
    both = torch.float32, torch.bfloat16
    return {(backend, dtype): shards(rank, dtype, backend) for backend in ("triton", "cpu") for dtype in both}


def test_shards_of_the_vocabulary() -> None:
    for result in run_ranks(both_dtypes, 2):
        for (_, dtype), errors in result.items():
            assert errors.pop("loss") <= 1e-6
            assert errors.pop("token_loss") <= 1e-6
            assert all(value <= TOLERANCE[dtype] for value in errors.values()), errors


def test_products_off_the_cpu_are_accepted_by_torch() -> None:
    """The call that only CUDA computes, on meta tensors: into rows of a padded buffer, and added."""
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 6), (6, 5)))
    out = torch.empty(8, 16, device="meta")[:, :5]
    for add in (False, True):
        assert kernels.multiply(a, b, out, add=add) is out


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match="backend=triton cannot compute linear_cross_entropy"):
        run(make_case(Shape(N=3, d=4, V=5), torch.float64))


def test_the_gradient_of_the_weight_is_written_by_its_products_and_rounded_as_it_is_scaled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is filled with zeros but the bias's, and no pass over memory scales or casts alone."""
    N, d, V, chunks = 512, 32, 64, 2
    monkeypatch.setattr(op, "CHUNK_BYTES_ON_GPU", N // chunks * V * 4)
    with fake_cuda(), torch.device("cuda"), LaunchCounter() as counter:
        sizes = (N, d), (V, d), (V,)
        hidden, weight, bias = (torch.empty(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)
        linear_cross_entropy(hidden, weight, bias, torch.empty(N, dtype=torch.int64), backend="triton")
    found = {name: number for (_, name), number in counter.counts.by_operator.items()}
    of_count = {"ne": 1, "clamp_min": 1, "_to_copy": 1, "reciprocal": 1}
    of_sums = {"zeros": 1, "add_": chunks, "sum": 2 + chunks}  # of targets, losses and the bias
    scaled = {"mul": 2 + chunks + 2}  # the count's reciprocal and the loss; hidden states; weight and bias
    products = {"mm": 3 * chunks - 1, "addmm": chunks - 1, "softmax_kernel": chunks}
    assert found == of_count | of_sums | scaled | products
