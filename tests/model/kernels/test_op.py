"""How ops are registered: results, gradients and shapes as they are defined, without torch's compiler."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.op_shapes import equality_cases
from common.paths import REPOSITORY
from model.dropout import Draw
from model.kernels.op import OPS, op
from model.kernels.ops import route
from model.kernels.ops.elementwise import keep_mask, rotate
from model.kernels.ops.route import group_choices
from tests.harness import LIMIT_SECONDS, forked
from tests.model.kernels.test_handing_on import WAYS, handing_on, stored


@op("test_scaled")
def _scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.sum()


@_scaled.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.factor, ctx.shape = inputs[1], inputs[0].shape


def _backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.factor + grad_sum.expand(ctx.shape), None


_scaled.register_autograd(_backward, setup_context=_setup)


@op("test_halved")
def _halved(x: Tensor) -> Tensor:
    return x / 2


def test_an_op_computes_what_its_body_does_and_has_its_gradient() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scaled, total = _scaled(x, 3.0)
    assert torch.equal(scaled, x * 3.0) and torch.equal(total, x.sum())
    assert torch.equal(_scaled(x, factor=3.0)[0], scaled)
    assert torch.autograd.gradcheck(lambda x: _scaled(x, 3.0), x)
    torch.library.opcheck(_scaled.overload, (x, 3.0))


def test_an_op_without_a_gradient_says_so() -> None:
    with pytest.raises(RuntimeError, match="switchall::test_halved has no gradient"):
        _halved(torch.ones(2, requires_grad=True)).sum().backward()


def test_a_compiled_function_calls_the_op_and_does_not_look_into_it() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    x = torch.randn(4)
    compiled = torch.compile(lambda x: _scaled(x + 1, 2.0)[0], backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), (x + 1) * 2.0)
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"].count(_scaled.overload) == 1


def test_an_op_is_what_torch_knows_by_its_name() -> None:
    assert OPS["test_scaled"] is _scaled and _scaled.overload is torch.ops.switchall.test_scaled.default


class Calls(TorchDispatchMode):
    """The first call of each of our ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "switchall":
            given = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in args)
            self.found.setdefault(func._opname, given)
        return func(*args, **(kwargs or {}))


def test_no_op_changes_or_returns_what_its_schema_does_not_say_and_all_promise_their_shapes() -> None:
    torch.manual_seed(0)
    with Calls() as calls:
        for build in equality_cases(small=True):
            case = build()
            leaves = {name: leaf.float().requires_grad_() for name, leaf in case.leaves.items()}
            # The other backends of these are no ops: autograd sees through them.
            backend = "triton" if case.op == "elementwise" or case.op.endswith("_attention") else "cpu"
            outputs = case.compute(leaves | case.constants, backend)
            sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
        group_choices(torch.tensor([[[0, 2]], [[1, 2]]]), 3, backend="cpu")
        q, tables = torch.randn(2, 3, 2, 4, requires_grad=True), (torch.rand(3, 1, 2), torch.rand(3, 1, 2))
        (rotate(q, None, tables, heads=1, backend="triton")[0].sum()).backward()
        keep_mask((2, 3, 4), Draw(0.5, 7, torch.arange(2)), backend="triton")
        for way in WAYS:
            t = {name: leaf.requires_grad_() for name, leaf in stored(torch.float32).items()}
            x, results = handing_on(way, t)
            (x.square().sum() + sum(y.sum() for y in results)).backward()
    ours = {name for name in OPS if not name.startswith("test_")}
    assert set(calls.found) == ours
    for name, given in calls.found.items():
        torch.library.opcheck(OPS[name].overload, given, test_utils=("test_schema", "test_faketensor"))


def import_again() -> None:
    x, weight = torch.randn(4, 8), torch.randn(1, 4, 8)
    before = route.route(x, weight, 2, backend="cpu")
    importlib.reload(route)
    with FlopCounterMode(display=False) as counter:
        after = route.route(x.requires_grad_(), weight, 2, backend="cpu")
    assert torch.equal(before.scores, after.scores)
    after.scores.sum().backward()
    assert x.grad is not None and OPS["route"] is route._route
    assert counter.get_total_flops() == 2 * 4 * 4 * 8


def test_a_module_of_ops_may_be_imported_again() -> None:
    """As a notebook does, and an import after one that failed. In a process of its own: other tests have imported the
    functions of before."""
    with forked(import_again) as process:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0


def test_a_step_of_a_model_imports_no_compiler() -> None:
    """In a process of its own: other tests import it."""
    code = """
import sys
import torch
from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel

config = ModelConfig.model_validate({
    "d_model": 8, "num_layers": 1, "vocab_size": 11, "sequence_length": 4, "dropout": 0.1,
    "attention": {"type": "switchhead", "num_heads": 2, "head_dim": 4, "num_experts": 2, "active_experts": 1},
    "feedforward": {"type": "sigma_moe", "num_experts": 4, "expert_size": 8, "active_experts": 2},
})
model = LanguageModel(config, backends=Backends.choose("auto", config, device_type="cpu", dtype=torch.float32), seed=0)
tokens = torch.zeros(2, 4, dtype=torch.int64)
model(tokens, tokens, torch.arange(2))[0].backward()
print(sorted({"torch._dynamo", "sympy", "torch._inductor"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
