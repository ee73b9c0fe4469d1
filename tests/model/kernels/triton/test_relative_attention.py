"""The kernels of relative_attention, interpreted in small tiles, with every access checked: the oracle's values and
gradients, no races, no atomics, the same bits again; chunks of sequences; nothing as large as the logits of all."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fake_cuda import backward, fake_cuda
from benchmarks.kernel_cases.recording import recording
from benchmarks.launch_counter import Counts, LaunchCounter
from model.kernels.ops.relative_attention import Inputs, relative_attention
from model.kernels.triton import relative_attention as kernels
from tests.model.kernels.test_relative_attention import SHAPES, Shape, check, make_inputs, run

FORWARD = ["position_logits_kernel", "forward_kernel"]
BACKWARD = ["position_logits_kernel", "query_gradient_kernel", "key_gradient_kernel"]


WORKSPACE = kernels.workspace
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
"""numpy's, of the interpreter: what a mask leaves out is computed too."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many keys as queries, and of other numbers. What no kernel has written is NaN."""
    monkeypatch.setattr(kernels, "workspace", lambda inputs: WORKSPACE(inputs).fill_(torch.nan))
    monkeypatch.setattr(kernels, "PLACES", {"QUERIES": 16, "KEYS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 1})
    tiles = {"forward": (16, 32, 4, 1), "queries": (16, 16, 4, 1)}
    both, apart = {"k and v": (16, 32, 4, 1)}, {"k": (16, 16, 4, 1), "v": (16, 32, 4, 1)}
    monkeypatch.setattr(kernels, "TILES", {16: tiles | both, 32: tiles | apart})


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name: str) -> None:
    with recording() as launches:
        check(SHAPES[name], torch.float32, "triton")
    apart = BACKWARD[-1:] * (SHAPES[name].h > 16)
    assert [launch.kernel for launch in launches] == FORWARD + BACKWARD + apart
    assert not any(launch.atomics for launch in launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check(SHAPES["longer than a tile, width 11"], dtype, "triton")


def test_a_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three, then the third; the same bits again."""
    shape = Shape(T=18, M=6, h=8, B=3, H=1, K=1, P=1, biases=True)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 2 * 18 * 24 * 4 + 5)
    assert WORKSPACE(make_inputs(shape, torch.float32)).shape == (1, 2, 18, 24)
    with recording() as launches:
        once = check(shape, torch.float32, "triton")
    assert [launch.kernel for launch in launches] == 2 * FORWARD + 2 * BACKWARD
    again = run(make_inputs(shape, torch.float32), "triton")
    assert all(torch.equal(value, again[what]) for what, value in once.items())


def test_views_and_the_gradient_of_a_view() -> None:
    """Queries beside keys in one product, an upstream gradient that autograd expanded."""
    shape = SHAPES["no memory"]
    content, _, k, v, position_keys = make_inputs(shape, torch.float32)
    joint = torch.cat([content, k], 2).detach().requires_grad_()
    q, keys = joint.split(2, dim=2)
    out = relative_attention(Inputs(q, q, keys, v, position_keys), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), [joint])
    wanted = relative_attention(Inputs(content, content, k, v, position_keys), backend="reference")
    grads = torch.autograd.grad(wanted.sum(), [content, k])
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(grad, torch.cat(grads, 2), rtol=1e-5, atol=1e-5)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 256 columns here, not 264: set kernels\.backend=reference"):
        run(make_inputs(Shape(T=2, M=0, h=264), torch.float32), "triton")


@pytest.mark.parametrize("biases", [False, True])
def test_the_gradients_of_queries_that_serve_both_terms_are_added_up_inside_a_product(biases: bool) -> None:
    """And they are filled up to whole 16 bytes once; with biases each term has queries of its own."""
    B, T, H, h = 2, 32, 2, 20
    with fake_cuda(), torch.device("cuda"), LaunchCounter() as counter:
        sizes = (B, T, H, h), (B, T, H, h), (B, 2 * T, H, h), (B, 2 * T, H, h), (2 * T, H, h)
        content, position, *others = (torch.empty(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)
        inputs = Inputs(content, position if biases else content, *others)
        out = relative_attention(inputs, backend="triton")
        forward, counter.counts = counter.counts, Counts()
        backward(out.sum(), counter.before_node)
    (before, after) = (
        {name: number for (_, name), number in counts.by_operator.items()} for counts in (forward, counter.counts)
    )
    given = 5 if biases else 4
    assert before["constant_pad_nd"] == given + 1 and after["constant_pad_nd"] == given + 2 + given
    products = {"bmm": 2} if biases else {"bmm": 1, "baddbmm": 1}
    assert {name: n for name, n in after.items() if "bmm" in name} == products
    assert "add" not in after
