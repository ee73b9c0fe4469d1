"""The SwitchHead authors' layers in plain PyTorch, from the equations of their papers and the layout of their weights:
token by token and head by head, without any code of this project or of theirs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tensors import sum_of

State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Every tensor normal, scaled so that logits and gates are far from saturated."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) / math.sqrt(max(s[-1], 4)) for n, s in shapes.items()}


def sinusoid(distance: int, d: int) -> Tensor:
    angles = [distance / 10000 ** (2 * (c // 2) / d) for c in range(d)]
    return torch.tensor([math.sin(a) if c % 2 == 0 else math.cos(a) for c, a in enumerate(angles)])


def rotated(x: Tensor, position: int, width: int) -> Tensor:
    """RoPE of one vector: element i of the first `width` and i + width / 2 are a complex number."""
    half = width // 2
    turn = torch.tensor([position / 10000 ** (2 * i / width) for i in range(half)])
    turned = torch.complex(x[:half], x[half:width]) * torch.polar(torch.ones(half), turn)
    return torch.cat([turned.real, turned.imag, x[width:]])


def mixed(x: Tensor, experts: Tensor, selector: Tensor, k: int) -> Tensor:
    """sum over the k best e of sigmoid(x . selector_e) x W_e, for one token; `experts` [E, in, out]."""
    scores = torch.sigmoid(selector @ x)
    return sum((scores[e] * (x @ experts[e]) for e in scores.topk(k).indices), torch.zeros(experts.shape[2]))


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], bias: Any, first: int) -> list[Tensor]:
    """One head: query t stands at first + t, sees keys up to there, and `bias(t, j)` is added to its logits."""
    out = []
    for t, query in enumerate(q):
        logits = torch.stack([query @ k[j] + bias(t, j) for j in range(first + t + 1)])
        out.append(sum((w * v[j] for j, w in enumerate(logits.softmax(0))), torch.zeros_like(v[0])))
    return out


def switchhead(state: State, context: Tensor, T: int, *, sizes: dict[str, Any]) -> Tensor:
    """`context` [L, d]; the last T tokens ask. `sizes`: H, h, E, k, rope (width that is rotated, 0: XL), experts (the
    letters of q, k, v, o that are expert projections) and selector (letter -> the letter whose selector chooses)."""
    H, h, E, top = (sizes[key] for key in ("H", "h", "E", "k"))
    d, first = context.shape[1], len(context) - T
    tokens = {"q": context[first:], "k": context, "v": context}

    def weight(letter: str) -> Tensor:
        for name in (f"projections.{letter}", f"{letter}.weight", letter):
            if name in state:
                return state[name]
        raise KeyError(letter)

    def selector(letter: str, head: int) -> Tensor:
        owner = sizes["selector"].get(letter, letter)
        found = state[f"selections.{owner}"] if f"selections.{owner}" in state else state[f"sel_{owner}"]
        return found[head * E : head * E + E]

    def project(letter: str, head: int) -> list[Tensor]:
        if letter in sizes["experts"]:
            experts = weight(letter)[head * E : head * E + E]
            return [mixed(x, experts, selector(letter, head), top) for x in tokens[letter]]
        return list(tokens[letter] @ weight(letter)[head * h : head * h + h].T)

    y = torch.zeros(T, d)
    for head in range(H):
        q, k, v = (project(letter, head) for letter in "qkv")
        if sizes["rope"]:
            q = [rotated(x, first + t, sizes["rope"]) for t, x in enumerate(q)]
            k = [rotated(x, j, sizes["rope"]) for j, x in enumerate(k)]

        def bias(t: int, j: int, q: list[Tensor] = q, head: int = head) -> Any:
            if sizes["rope"]:
                return 0.0
            return q[t] @ (state["pos_to_pk"][head * h : head * h + h] @ sinusoid(j - first - t, d)) * h**-0.25

        # As there: queries, keys and what positions give each carry h^(-1/4).
        q[:] = [x * h**-0.25 for x in q]
        k[:] = [x * h**-0.25 for x in k]
        for t, a in enumerate(attend(q, k, v, bias, first)):
            if "o" not in sizes["experts"]:
                y[t] += weight("o")[:, head * h : head * h + h] @ a
            elif E == 1:  # the public module: a gate, and a dense output
                gate = torch.sigmoid(state["sel_o"][head] @ context[first + t])
                y[t] += state["o"][:, head * h : head * h + h] @ (gate * a)
            else:
                scores = torch.sigmoid(selector("o", head) @ context[first + t])
                for e in scores.topk(top).indices:
                    y[t] += scores[e] * (a @ weight("o")[head * E + int(e)])
    return y


def dense(state: State, context: Tensor, T: int, *, sizes: dict[str, Any]) -> Tensor:
    """The baseline: `sizes` H, h and rope."""
    H, h, d, first = sizes["H"], sizes["h"], context.shape[1], len(context) - T
    y = torch.zeros(T, d)
    for head in range(H):
        both = state["data_to_kv.weight"]
        if sizes["rope"]:  # all keys, then all values
            of_key, of_value = both[head * h : head * h + h], both[(H + head) * h : (H + head) * h + h]
        else:  # key and value of a head, head by head
            of_key, of_value = both[2 * head * h : (2 * head + 1) * h], both[(2 * head + 1) * h : (2 * head + 2) * h]
        plain = list(context[first:] @ state["data_to_q.weight"][head * h : head * h + h].T)
        k, v = list(context @ of_key.T), list(context @ of_value.T)
        if sizes["rope"]:
            q = [rotated(x, first + t, sizes["rope"]) * h**-0.5 for t, x in enumerate(plain)]
            k = [rotated(x, j, sizes["rope"]) for j, x in enumerate(k)]
            attended = attend(q, k, v, lambda t, j: 0.0, first)
        else:
            scale = state["scale"][0]
            q = [(x + state["global_content_bias"][head]) * scale for x in plain]

            def bias(t: int, j: int, plain: list[Tensor] = plain, head: int = head) -> Tensor:
                query = (plain[t] + state["global_pos_bias"][head]) * state["scale"][0]
                return query @ (state["pos_to_pq.weight"][head * h : head * h + h] @ sinusoid(j - first - t, d))

            attended = attend(q, k, v, bias, first)
        merge = state["out_proj.weight" if sizes["rope"] else "multi_head_merge.weight"][:, head * h : head * h + h]
        y += torch.stack(attended) @ merge.T
    return y


def moa(state: State, context: Tensor, T: int, *, sizes: dict[str, Any]) -> Tensor:
    """`sizes` h, k (active), softmax: over all experts, or a sigmoid of each."""
    h, d, first = sizes["h"], context.shape[1], len(context) - T
    keys, values = (context @ state["data_to_kv"]).split(h, dim=1)
    y, scale = torch.zeros(T, d), state["scale"][0]
    for t in range(T):
        x = context[first + t]
        logits = state["sel_dst"] @ x
        gates = logits.softmax(0) if sizes["softmax"] else logits.sigmoid()
        for e in gates.topk(sizes["k"]).indices:
            q = x @ state["data_to_q"][e]
            scores = torch.stack(
                [q @ (keys[j] + state["pos_to_pk"] @ sinusoid(j - first - t, d)) * scale for j in range(first + t + 1)]
            )
            y[t] += gates[e] * ((scores.softmax(0) @ values[: first + t + 1]) @ state["out_proj"][e])
    return y


def feedforward(state: State, x: Tensor, k: int) -> Tensor:
    """sigma-MoE where there are experts, else the dense layer. [T, d] -> [T, d]."""
    if "linear1.weight" in state:
        hidden = F.relu(F.linear(x, state["linear1.weight"], state["linear1.bias"]))
        return F.linear(hidden, state["linear2.weight"], state["linear2.bias"])
    rows = []
    for token in x:
        scores = torch.sigmoid(state["expert_sel"] @ token)
        best = scores.topk(k).indices
        rows.append(sum_of(scores[e] * (F.relu(token @ state["keys"][e]) @ state["values"][e]) for e in best))
    return torch.stack(rows)


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def logits(state: State, tokens: Tensor, *, sizes: dict[str, Any], active: int, names: dict[str, str]) -> Tensor:
    """A SwitchAll model of two blocks on one text [T] -> [T, V]. `names`: what attention, feedforward, attention_norm,
    feedforward_norm of block {}, embedding, final_norm and head are called."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = state[f"{names['embedding']}.weight"][tokens]
    for n in range(2):
        at = {key: name.format(n) for key, name in names.items()}
        x = x + switchhead(part(state, f"{at['attention']}."), norm(x, at["attention_norm"]), len(x), sizes=sizes)
        x = x + feedforward(part(state, f"{at['feedforward']}."), norm(x, at["feedforward_norm"]), active)
    return F.linear(norm(x, names["final_norm"]), state[f"{names['head']}.weight"], state[f"{names['head']}.bias"])
