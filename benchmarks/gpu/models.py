"""The models of `speed`: a shipped configuration, and a dense one of as many parameters. Needs pydantic, which a wheel
can bring (docs/gpu.md)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.command import Unavailable
from benchmarks.gpu.record import ROOT

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.language_model import LanguageModel

FILES = {
    "1b": "configs/switchall_1b.json",
    "262m": "configs/paper/c4_switchhead_262m.json",
    "tiny": "configs/switchall_tiny.json",
}


SHORT = {"sequence_length": 16}
"""Of models whose Triton kernels are interpreted."""


def load(name: str, **changes: Any) -> ModelConfig:
    """The model section of a configuration, with other values at its top level. Raises Unavailable without pydantic."""
    if importlib.util.find_spec("pydantic") is None:
        raise Unavailable("pydantic is not installed: carry the wheels (docs/gpu.md)")
    from model.config import ModelConfig

    raw = json.loads((ROOT / FILES[name]).read_text(encoding="utf-8"))["model"]
    return ModelConfig.model_validate(raw | changes)


def dense_counterpart(config: ModelConfig) -> ModelConfig:
    """Attention and feed-forward without experts, of as many parameters as the experts of `config` have, selectors left
    out: heads of the same width, and a hidden layer as wide as all experts."""
    from model.config import DenseAttentionConfig, DenseFeedForwardConfig, SigmaMoEConfig, SwitchHeadConfig

    attention, feedforward = config.attention, config.feedforward
    assert isinstance(attention, SwitchHeadConfig)
    experts = len(attention.expert_projections)
    matrices = attention.num_heads * (experts * attention.num_experts + 4 - experts)
    heads = DenseAttentionConfig(num_heads=round(matrices / 4), head_dim=attention.head_dim)
    changes: dict[str, Any] = {"attention": heads}
    if isinstance(feedforward, SigmaMoEConfig):
        changes["feedforward"] = DenseFeedForwardConfig(hidden_size=feedforward.num_experts * feedforward.expert_size)
    return config.model_copy(update=changes)


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> LanguageModel:
    """With `backend` where an op has it, else the fastest ones of the device. Statistics of the routers are where the
    model is."""
    from model.kernels.choice import Backends
    from model.language_model import LanguageModel, routing_statistics

    torch.manual_seed(0)
    backends = Backends.choose(backend, config, device_type=device.type, dtype=dtype)
    with torch.device(device):
        model = LanguageModel(config, backends=backends, seed=0)
        with torch.no_grad():  # drawn on the device: times do not depend on the recipe, but on ordinary values
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(device=device, dtype=dtype)
    for _, statistics in routing_statistics(model):
        statistics.to(device)
    return model


@contextlib.contextmanager
def as_in_training(device: torch.device) -> Iterator[None]:
    """torch's switches on a GPU as launch/pretrain.py sets them: what is timed is what a run computes."""
    if device.type != "cuda":
        yield
        return
    from pretrain.gpus import numerics

    with numerics(device, deterministic=False):
        yield


def fill_memory(module: nn.Module, index: Tensor, chunks: int, forward: Callable[[], Any]) -> None:
    """Transformer-XL memory of the sequences `index`, full as in training: of `chunks` calls of `forward`."""
    from model.memory import layer_memories

    memories = [memory for _, memory in layer_memories(module)]
    for memory in memories:
        memory.assign(index, len(index))
    for _ in range(chunks if memories else 0):
        with torch.no_grad():
            forward()
        for memory in memories:
            memory.advance()
