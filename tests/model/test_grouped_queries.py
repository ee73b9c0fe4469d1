"""Dense attention whose heads share keys and values in groups, against each head by itself in fp64: forward and every
gradient, with RoPE and Transformer-XL positions, memory and documents. A head of keys and values for each head is the
layer without the key, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from common.errors import ConfigError
from common.json_config import validate
from model.attention.dense import DenseAttention
from model.config import DenseAttentionConfig, ModelConfig, RopeConfig
from model.documents import Documents
from model.kernels.choice import Backends
from model.kernels.ops.causal_attention import torch_attention
from model.language_model import build_model
from model.parallel.context import ParallelContext
from tests.model.oracles import rotate, sinusoid
from tests.tensors import gradient_of

XL = {"type": "xl"}
# H, K, h, d, position (fraction of RoPE, or XL), memory, tokens, sequences, whether they hold several documents
CASES = [
    (6, 2, 5, 11, 0.8, 0, 7, 2, False),
    (6, 3, 4, 13, 0.5, 0, 5, 2, True),
    (4, 1, 7, 9, 1.0, 0, 6, 1, True),
    (6, 2, 3, 10, 0.5, 6, 4, 2, False),
    (3, 3, 5, 8, 0.5, 3, 4, 1, False),
    (6, 2, 5, 11, XL, 0, 6, 2, False),
    (6, 3, 4, 13, XL, 5, 4, 2, False),
    (5, 1, 3, 10, XL, 4, 3, 1, False),
    (4, 4, 3, 7, XL, 4, 3, 1, False),
]


def config_of(H: int, K: int | None, h: int, d: int, position: float | dict[str, Any], T: int) -> ModelConfig:
    if isinstance(position, float):
        position = {"type": "rope", "fraction": position, "base": 50.0}
    return ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "attention": {"type": "dense", "num_heads": H, "num_kv_heads": K, "head_dim": h},
            "position": position,
            "feedforward": {"type": "dense", "hidden_size": 5},
        }
    )


def layer_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> DenseAttention:
    layer = DenseAttention(config, parallel=ParallelContext(), backends=Backends(), name="attention", seed=3).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def by_heads(context: Tensor, T: int, p: dict[str, Tensor], config: ModelConfig, first: Tensor) -> Tensor:
    """One sequence `context` [L, d] -> [T, d]. Head i reads columns (i K) // H of keys and values; query t sees keys
    from first[t] on."""
    attention, position, (L, d) = config.attention, config.position, context.shape
    assert isinstance(attention, DenseAttentionConfig)
    H, K, h = attention.num_heads, attention.num_kv_heads or attention.num_heads, attention.head_dim
    heads = []
    for i in range(H):
        group = slice(i * K // H * h, (i * K // H + 1) * h)
        q = context[L - T :] @ p["query.weight"][i * h : (i + 1) * h].T
        k, v = (context @ p[f"{name}.weight"][group].T for name in ("key", "value"))
        rows = []
        for t in range(T):
            seen = range(int(first[t]), L - T + t + 1)
            if isinstance(position, RopeConfig):
                own, *others = (
                    rotate(row, at, fraction=position.fraction, base=position.base)
                    for row, at in [(q[t], L - T + t), *((k[j], j) for j in seen)]
                )
                logits = torch.stack(others) @ own * h**-0.5
            else:
                far = torch.stack([p["position.weight"][group] @ sinusoid(L - T + t - j, d) for j in seen])
                logits = k[list(seen)] @ (q[t] + p["content_bias"][i]) + far @ (q[t] + p["position_bias"][i])
                logits = p["scale"] * logits
            rows.append((logits - logits.max()).exp() / (logits - logits.max()).exp().sum() @ v[list(seen)])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ p["output.weight"].T


@pytest.mark.parametrize("H, K, h, d, position, memory, T, B, several", CASES)
def test_forward_and_every_gradient_equal_each_head_by_itself(
    H: int, K: int, h: int, d: int, position: float | dict[str, Any], memory: int, T: int, B: int, several: bool
) -> None:
    config = config_of(H, K, h, d, position, T)
    layer, generator = layer_of(config), torch.Generator().manual_seed(1)
    context = torch.randn(B, memory + T, d, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(B, T, d, generator=generator, dtype=torch.float64)
    documents, first = None, torch.zeros(B, T)
    if several:
        documents = Documents.of((torch.arange(T) >= 2).long().expand(B, T) + (torch.arange(T) >= T - 1).long())
        first = documents.first
    y, _ = layer(context, T, torch.arange(B), documents)
    y.backward(upstream)

    p = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    other = context.detach().clone().requires_grad_()
    expected = torch.stack([by_heads(other[b], T, p, config, first[b]) for b in range(B)])
    expected.backward(upstream)
    # The layer's RoPE and softmax with XL positions are fp32 or better; sinusoids are rounded to fp32.
    bound = 1e-5 * float(expected.detach().abs().max())
    assert float((y - expected).detach().abs().max()) < bound
    largest = max(float(gradient_of(value).norm()) for value in p.values())
    for name, found, wanted in [
        ("the context", gradient_of(context), gradient_of(other)),
        *((name, gradient_of(value), gradient_of(p[name])) for name, value in layer.named_parameters()),
    ]:
        assert found.shape == wanted.shape
        error = float((found - wanted).norm())
        assert error < 1e-5 * max(float(wanted.norm()), 1e-3 * largest), f"gradient of {name} is off by {error}"


@pytest.mark.parametrize("position", [0.5, {"type": "xl", "memory_chunks": 0}])
def test_keys_and_values_of_each_head_are_the_layer_without_the_key(position: float | dict[str, Any]) -> None:
    """Initial weights, logits and gradients to the last bit; and nothing that is saved names the key."""
    found = []
    for K in (None, 6):
        config = config_of(6, K, 5, 11, position, 7)
        model = build_model(config, seed=5)
        tokens = torch.tensor([[0, 1, 2, 3, 2, 1, 0]])
        objective, *_ = model(tokens, tokens.flip(1), torch.zeros(1, dtype=torch.int64))
        objective.backward()
        found.append({name: (p.detach(), gradient_of(p)) for name, p in model.named_parameters()})
        dump = config.model_dump(mode="json")["attention"]
        assert dump == {"type": "dense", "num_heads": 6, "head_dim": 5} | ({} if K is None else {"num_kv_heads": K})
        assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert found[0].keys() == found[1].keys()
    for name, (value, gradient) in found[0].items():
        assert torch.equal(value, found[1][name][0]) and torch.equal(gradient, found[1][name][1]), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("h", [8, 11, 200, 256, 258])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_kernel_of_torch_takes_every_call_on_cuda(
    dtype: torch.dtype, h: int, heads: tuple[int, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors, so without a GPU: what torch is given, by the conditions that its sdp_utils.cpp has for flash
    attention (cards of compute capability 8.0 or newer, all of them) and for the memory-efficient kernel."""
    calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, **options: Any) -> Tensor:
        assert (options["attn_mask"] is not None) == masked != options["is_causal"]
        calls.append((q, k, v, enable_gqa))
        return torch.empty_like(q)

    H, K = heads
    with fake_cuda(), torch.device("cuda"):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        given = [torch.empty(1, 5, count, h, dtype=dtype).transpose(1, 2) for count in (H, K, K)]
        mask = torch.ones(5, 5, dtype=torch.bool) if masked else None
        out = torch_attention(*given, mask=mask, shared=K < H)
        monkeypatch.undo()
    assert out.shape == (1, H, 5, h)
    ((q, k, v, enable_gqa),) = calls
    num_keys, width = k.shape[1], q.shape[3]
    assert k.shape == v.shape and all(t.stride(3) == 1 for t in (q, k, v))
    is_flash = not masked and dtype == torch.bfloat16 and (width <= 192 or 224 < width <= 256)
    is_flash = is_flash and (num_keys == H or enable_gqa)
    is_memory_efficient = num_keys == H and width * q.element_size() % 16 == 0
    assert is_flash or is_memory_efficient
    if is_flash:  # what is read as it is
        assert all(t is before for t, before in zip((q, k, v), given, strict=True))
    else:
        assert k.stride(1) and v.stride(1), "by a stride of 0 a query alone would get another one's mask"


def test_a_part_of_a_group_is_refused() -> None:
    section = {"type": "dense", "num_heads": 6, "num_kv_heads": 4}
    sizes = {"d_model": 8, "num_layers": 1, "vocab_size": 4, "sequence_length": 4}
    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, sizes | {"attention": section})
    assert str(error.value) == (
        "attention: num_kv_heads is 4, which does not divide num_heads = 6; set num_kv_heads to a divisor of 6, "
        "or null for one of each head"
    )
