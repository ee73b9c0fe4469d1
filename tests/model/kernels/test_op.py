"""How ops are registered: results, gradients and shapes as they are defined, without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from common.paths import REPOSITORY
from model.kernels.op import OPS, op


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
