"""Other projects' mixture-of-experts layers on CPU, set to the work of sigma-MoE.

The same tokens, experts, widths and k, ReLU, no bias, no token dropped, no load-balancing loss where the layer has a
switch for it. Their routers differ (softmax in DeepSpeed) and stay: they are part of what the layer costs.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
Peer = tuple[Layer, list[nn.Parameter]]


def grouped_mm(router: Tensor, up_experts: Tensor, down_experts: Tensor, k: int) -> Layer:
    """What one writes around F.grouped_mm with autograd doing the rest: sort, two products, gather, sum."""

    def forward(x: Tensor) -> Tensor:
        scores, index = F.linear(x.float(), router.float()).sigmoid().topk(k)
        order = index.flatten().sort(stable=True).indices
        offsets = index.flatten().bincount(minlength=router.shape[0]).cumsum(0).int()
        hidden = F.relu(F.grouped_mm(x[order // k], up_experts, offs=offsets))
        rows = F.grouped_mm(hidden * scores.flatten()[order, None].to(x.dtype), down_experts, offs=offsets)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        return rows[slots].view(*index.shape, -1).sum(1)

    return forward


def deepspeed_moe(d: int, num_experts: int, expert_size: int, k: int, dtype: torch.dtype) -> Peer:
    """deepspeed.moe.layer.MoE without capacity limit: a module per expert, each filled up to the most loaded one."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _one_rank()
    import deepspeed
    from deepspeed.moe.layer import MoE

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(d, expert_size, bias=False)
            self.down = nn.Linear(expert_size, d, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed("gloo", verbose=False)
        layer = MoE(d, Expert(), num_experts=num_experts, k=k, drop_tokens=False, use_rts=False)
        layer.set_deepspeed_parallelism()
    layer.to(dtype)
    return lambda x: layer(x[None])[0][0], list(layer.parameters())


def megatron_sequential_mlp(d: int, num_experts: int, expert_size: int, k: int, dtype: torch.dtype) -> Peer:
    """megatron-core's MoELayer: all-gather dispatcher, SequentialMLP (a loop over experts), sigmoid router in fp32.

    On a CPU it runs only inside `_without_cuda`, which holds for its own forward passes alone.
    """
    _one_rank()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Its router's backward pass asks whether there is this GEMM; without Transformer Engine the name itself is missing.
    moe_utils.te_general_gemm = None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=d,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=k,
        moe_ffn_hidden_size=expert_size,
        moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=False,
        add_bias_linear=False,
        activation_func=F.relu,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = MoELayer(config, submodules=MoESubmodules(experts=ModuleSpec(SequentialMLP, submodules=submodules)))

    def forward(x: Tensor) -> Tensor:
        with _without_cuda():
            y: Tensor = layer(x[:, None])[0][:, 0]
        return y

    return forward, list(layer.parameters())


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """Lets megatron-core's router run: it moves its weight to the current CUDA device, and compiles a function for
    CUDA. Undone at once: nothing of it may reach the layers that are timed in between."""
    own = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.cuda.current_device = own


def _one_rank() -> None:
    """Both libraries insist on a process group."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29531")
