"""Every op of model/kernels as a function of named tensors, at shapes for checks of equality and for timing.

Tensors are drawn on torch's default device: `with torch.device("cuda"):` draws there, "meta" gives names and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.documents import Documents
from model.dropout import Draw
from model.kernels.ops import causal_attention
from model.kernels.ops.elementwise import dropout, entropy, layer_norm, rotate
from model.kernels.ops.expert_linear import expert_linear, expert_linear_sum
from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from model.kernels.ops.relative_attention import Inputs, relative_attention
from model.kernels.ops.route import Choice, group_choices, route_handing_on
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe
from model.kernels.ops.switchhead import switchhead_output, switchhead_value_handing_on


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    shape: str
    leaves: dict[str, Tensor]
    """fp64, differentiable; `scores` and `logits` stay in fp32 or better."""
    constants: dict[str, Tensor]
    """Indices."""
    compute: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]
    """From leaves and constants, with a backend -> what is differentiated. Waits for nothing: it is what is timed."""
    per_token: tuple[str, ...]
    """Leaves and constants whose first axis are the N tokens."""
    share: Callable[[dict[str, Tensor]], Tensor] | None = None
    """From the constants of some of the tokens -> their weight in an output that is a mean over tokens; weights are
    compared with each other. None where every output has a row per token."""
    check: Callable[[dict[str, Tensor]], None] | None = None
    """After `compute`, on the tensors that it was given: AssertionError for what no tolerance is for."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that a backend may refuse (`resolve`)."""
        if self.op.startswith("switchhead"):
            _, E, *sides = self.leaves["experts"].shape
            d, h = sides if self.op == "switchhead_value" else sides[::-1]
            return d, h, E, self.constants["index"].shape[-1]
        if self.op.endswith("_attention"):
            return tuple(self.leaves["k"].shape[3:])
        return tuple(self.leaves["up"].shape[1:]) if self.op == "sigma_moe" else ()


Build = Callable[[], Case]
"""Draws the tensors of a case."""


def grouped(index: Tensor, num_experts: int) -> dict[str, Tensor]:
    """`index` [N, k], or [N, R, k] of R routers, and how its slots are grouped."""
    order, load = group_choices(index if index.dim() == 3 else index[:, None], num_experts, backend="reference")
    if index.dim() == 2:
        order, load = order[0], load[0]
    return {"index": index, "order": order, "load": load}


def choice(t: dict[str, Tensor]) -> Choice:
    return Choice(t["scores"], t["index"], t["order"], t["load"])


def choices(*rows: int, num_experts: int, k: int) -> Tensor:
    """Different experts per row; the last expert is rare, as experts are in training."""
    popularity = torch.rand(*rows, num_experts)
    popularity[..., -1] *= 0.7
    return popularity.topk(k).indices


def normal(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64) * scale


def route_case(N: int, d: int, R: int, E: int, k: int) -> Case:
    """The choice is the backend's own and checked by itself; values are compared at the experts that it chose, which
    `compute` leaves beside its tensors, and the x handed on."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        t["handed"], r = route_handing_on(t["x"], t["weight"], k, backend=backend)
        if backend == "reference" and "index" in t:
            return r.logits, r.logits.sigmoid().gather(-1, t["index"])
        t |= {"logits": r.logits.detach(), "index": r.index, "load": r.load, "order": r.order}
        return r.logits, r.scores

    def check(t: dict[str, Tensor]) -> None:
        check_choice(t["logits"], t["index"], t["load"], t["order"])

    leaves = {"x": normal(N, d), "weight": normal(R, E, d, scale=d**-0.5)}
    shape = f"N={N} d={d} R={R} E={E} k={k}"
    return Case("route", shape, leaves, {}, compute, ("x", "index"), check=check)


def handing_on(build: Build) -> Case:
    """A case whose op hands x on to a map."""
    case = build()

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        outputs = case.compute(t, backend)
        return *outputs, t["handed"] @ t["next"]

    d = case.leaves["x"].shape[1]
    leaves = case.leaves | {"next": normal(d, 8, scale=d**-0.5)}
    return case._replace(shape=f"{case.shape} handing on", leaves=leaves, compute=compute)


def check_choice(logits: Tensor, index: Tensor, load: Tensor, order: Tensor) -> None:
    """AssertionError unless `index` are the best logits, `load` their counts and `order` a stable sort."""
    R = logits.shape[1]
    torch.testing.assert_close(logits.gather(-1, index), logits.topk(index.shape[2]).values, rtol=0, atol=1e-6)
    slots = index.transpose(0, 1).reshape(R, -1)
    counts = torch.zeros_like(load).scatter_add_(1, slots, torch.ones_like(slots))
    torch.testing.assert_close(load, counts, rtol=0, atol=0)
    torch.testing.assert_close(order, slots.sort(dim=-1, stable=True).indices, rtol=0, atol=0)


def sigma_moe_case(N: int, d: int, E: int, k: int, G: int, *, adds: bool = False) -> Case:
    """`adds`: to the residual stream, as blocks without dropout do."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        experts = HeldExperts(t["up"], t["down"])
        return (sigma_moe(t["x"], choice(t), experts, backend=backend, residual=t.get("residual")),)

    leaves = {"x": normal(N, d), "scores": torch.rand(N, k, dtype=torch.float64)}
    leaves |= {"up": normal(E, d, G, scale=d**-0.5), "down": normal(E, G, d, scale=G**-0.5)}
    constants = grouped(choices(N, num_experts=E, k=k), E)
    shape = f"N={N} d={d} E={E} k={k} G={G}"
    per_token: tuple[str, ...] = "x", "scores", "index"
    if adds:
        shape, leaves["residual"], per_token = f"{shape} residual", normal(N, d), (*per_token, "residual")
    return Case("sigma_moe", shape, leaves, constants, compute, per_token)


def value_case(N: int, d: int, H: int, E: int, k: int, h: int) -> Case:
    """`compute` leaves the x handed on beside its tensors."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        t["handed"], v = switchhead_value_handing_on(t["x"], choice(t), t["experts"], backend=backend)
        return (v,)

    leaves = {"x": normal(N, d), "scores": torch.rand(N, H, k, dtype=torch.float64)}
    leaves["experts"] = normal(H, E, d, h, scale=d**-0.5)
    constants = grouped(choices(N, 2 * H, num_experts=E, k=k)[:, H:], E)  # routed together with others
    shape, per_token = f"N={N} d={d} H={H} E={E} k={k} h={h}", ("x", "scores", "index")
    return Case("switchhead_value", shape, leaves, constants, compute, per_token)


def output_case(N: int, d: int, H: int, E: int, k: int, h: int) -> Case:
    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return (switchhead_output(t["a"], choice(t), t["experts"], backend=backend),)

    leaves = {"a": normal(N, H, h), "scores": torch.rand(N, H, k, dtype=torch.float64)}
    leaves["experts"] = normal(H, E, h, d, scale=h**-0.5)
    constants = grouped(choices(N, 2 * H, num_experts=E, k=k)[:, H:], E)  # routed together with others
    shape, per_token = f"N={N} d={d} H={H} E={E} k={k} h={h}", ("a", "scores", "index")
    return Case("switchhead_output", shape, leaves, constants, compute, per_token)


def expert_linear_case(N: int, d: int, E: int, k: int, h: int) -> Case:
    """MoA's query and output projections, one after the other."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        q = expert_linear(t["x"], choice(t), t["query"], backend=backend)
        return q, expert_linear_sum(q, choice(t), t["output"], backend=backend)

    leaves = {"x": normal(N, d), "scores": torch.rand(N, k, dtype=torch.float64)}
    leaves |= {"query": normal(E, d, h, scale=d**-0.5), "output": normal(E, h, d, scale=h**-0.5)}
    constants = grouped(choices(N, num_experts=E, k=k), E)
    shape, per_token = f"N={N} d={d} E={E} k={k} h={h}", ("x", "scores", "index")
    return Case("expert_linear", shape, leaves, constants, compute, per_token)


def attention_case(B: int, T: int, H: int, h: int, *, shared: bool = False, biases: bool = False) -> Case:
    """Transformer-XL's, of T tokens after as many of memory. `shared`: one head of keys, values and position keys, as
    MoA; `biases`: the two terms have queries of their own, as the dense baseline."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        position = t.get("position_queries", t["content_queries"])
        inputs = Inputs(t["content_queries"], position, t["k"], t["v"], t["position_keys"])
        return (relative_attention(inputs, backend=backend),)

    L, K, names = 2 * T, 1 if shared else H, ("content_queries", "position_queries") if biases else ("content_queries",)
    leaves = {name: normal(B, T, H, h, scale=h**-0.5) for name in names}
    leaves |= {"k": normal(B, L, K, h), "v": normal(B, L, K, h), "position_keys": normal(L, K, h)}
    shape = f"B={B} T={T} H={H} h={h} K={K}{' biases' if biases else ''}"
    return Case("relative_attention", shape, leaves, {}, compute, (*names, "k", "v"))


def range_attention_case(B: int, T: int, H: int, h: int, *, length: int = 0, shared: bool = False) -> Case:
    """RoPE's, inside documents of `length` tokens, whose borders stand at other places in each sequence; 0: without
    documents, of T tokens after as many of memory. `shared`: one head of keys and values, as MoA."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        inputs = causal_attention.Inputs(q, k, v, t.get("first"), t.get("end"))
        return (causal_attention.causal_attention(inputs, backend=backend).transpose(1, 2),)

    L, K, constants = T if length else 2 * T, 1 if shared else H, {}
    if length:
        index = (torch.arange(T) + 37 * torch.arange(B)[:, None]) // length
        documents = Documents.of(index - index[:, :1])
        constants = {"first": documents.first, "end": documents.end}
    leaves = {"q": normal(B, T, H, h), "k": normal(B, L, K, h), "v": normal(B, L, K, h)}
    shape = f"B={B} T={T} H={H} h={h} K={K} {f'documents of {length}' if length else f'memory of {T}'}"
    return Case("causal_attention", shape, leaves, constants, compute, (*leaves, *constants))


def loss_case(N: int, d: int, V: int) -> Case:
    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(t["hidden"], t["weight"], t["bias"], t["targets"], backend=backend)[0],)

    targets = torch.randint(0, V, (N,))
    targets[::7] = -100
    leaves = {"hidden": normal(N, d), "weight": normal(V, d, scale=d**-0.5), "bias": normal(V)}

    def share(constants: dict[str, Tensor]) -> Tensor:
        return (constants["targets"] != -100).sum().double()

    shape, per_token = f"N={N} d={d} V={V}", ("hidden", "targets")
    return Case("linear_cross_entropy", shape, leaves, {"targets": targets}, compute, per_token, share)


def dropout_case(B: int, T: int, d: int) -> Case:
    """With the residual addition; the mask is the backend's own, and compared through the values."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        draw = Draw(0.2, 2**62 + 12345, t["sequence_index"])
        return (dropout(t["x"], draw, t["residual"], backend=backend),)

    leaves = {"x": normal(B, T, d), "residual": normal(B, T, d)}
    constants = {"sequence_index": torch.arange(B) + 2**33}
    return Case("elementwise", f"dropout B={B} T={T} d={d}", leaves, constants, compute, (*leaves, *constants))


def norm_case(B: int, T: int, d: int, probability: float | None) -> Case:
    """The sum with a branch after dropout and its norm; None: the norm alone."""
    names = ("x", "weight", "bias") if probability is None else ("x", "weight", "bias", "branch")

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        draw = Draw(probability, 2**62 + 12345, t["sequence_index"]) if probability else None
        total, y = layer_norm(t["x"], t["weight"], t["bias"], 1e-5, branch=t.get("branch"), draw=draw, backend=backend)
        return (y,) if probability is None else (total, y)

    leaves = {name: normal(d) if name in ("weight", "bias") else normal(B, T, d) for name in names}
    constants = {"sequence_index": torch.arange(B) + 2**33} if probability else {}
    shape = f"norm B={B} T={T} d={d} {'alone' if probability is None else f'dropout={probability:g}'}"
    per_token = ("x", *(name for name in ("branch", "sequence_index") if name in leaves | constants))
    return Case("elementwise", shape, leaves, constants, compute, per_token)


def entropy_case(N: int, E: int) -> Case:
    """A σ-MoE router's regulariser; `compute` leaves the sums of its probabilities beside its tensors. One expert was
    never likely."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        value, t["probability_sum"] = entropy(t["logits"], t["probability"], 0.3, backend=backend)
        return (value,)

    def check(t: dict[str, Tensor]) -> None:
        wanted = t["logits"].detach().double().softmax(-1).sum(0)
        torch.testing.assert_close(t["probability_sum"], wanted, rtol=1e-6, atol=1e-9)

    def share(t: dict[str, Tensor]) -> Tensor:
        return torch.tensor(float(t["logits"].shape[0]), dtype=torch.float64)

    probability = normal(E).softmax(0)
    probability[0] = 0.0
    leaves, constants = {"logits": normal(N, E, scale=2.0)}, {"probability": probability}
    return Case("elementwise", f"entropy N={N} E={E}", leaves, constants, compute, ("logits",), share, check)


def rotate_case(B: int, T: int, H: int, h: int, half: int, kind: str = "") -> Case:
    """RoPE of queries and keys; `half` pairs of each head are rotated. `kind`: `joint`, queries and keys are one
    tensor; `memory`, as many keys again before the queries' own; `documents`, each sequence has tables of its own."""

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        tables = t["cos"], t["sin"]
        if backend not in ("reference", "cpu"):
            return rotate(t.get("joint", t.get("q")), t.get("k"), tables, heads=H, backend=backend)  # type: ignore[arg-type]
        return tuple(
            turned(x, *(table[..., table.shape[-3] - x.shape[1] :, :, :] for table in tables)) for x in apart(t)
        )

    def apart(t: dict[str, Tensor]) -> Sequence[Tensor]:
        return t["joint"].split(H, 2) if kind == "joint" else (t["q"], t["k"])

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., :half], x[..., half : 2 * half]
        found = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), x[..., 2 * half :]
        return torch.cat(found, -1)

    L = 2 * T if kind == "memory" else T
    if kind == "joint":
        leaves = {"joint": normal(B, T, 2 * H, h)}
    else:
        leaves = {"q": normal(B, T, H, h), "k": normal(B, L, H, h)}
    position = torch.arange(L, dtype=torch.float32)
    if kind == "documents":
        position = (position + 37 * torch.arange(B)[:, None]) % (L // 3 + 1)
    angle = position[..., None, None] * 1e-4 ** torch.linspace(0, 1, half)
    constants = {"cos": angle.cos(), "sin": angle.sin()}
    shape = f"rotate B={B} T={T} H={H} h={h} half={half}{kind and ' '}{kind}"
    per_token = (*leaves, *(constants if kind == "documents" else ()))
    return Case("elementwise", shape, leaves, constants, compute, per_token)
