"""One HTML page of everything that was found: no script, no network, images inside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from common import html_page
from pretrain.analysis.findings import Findings, shown
from pretrain.analysis.trace import RouterTrace
from pretrain.report.model_text import model_text

DRAWN_TOKENS = 240
"""Tokens of the text that are coloured by expert."""
STYLE = """
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; } details { margin: .3rem 0; padding-left: .2rem; }
.text { font-family: ui-monospace, monospace; font-size: 13px; line-height: 2; overflow-wrap: anywhere; }
.text span { padding: 1px 0; border-bottom: 3px solid transparent; white-space: pre-wrap; }
.chip { display: inline-block; padding: 0 .5rem; margin: 0 .3rem .3rem 0; border-radius: 3px; font-size: 12px; }
"""


class Page:
    """The page as it grows; `pictures` are PNG files by name."""

    def __init__(self, runs: Sequence[Findings], pictures: Mapping[str, bytes], text_name: str) -> None:
        self._runs, self._pictures, self._text_name = runs, pictures, text_name

    def html(self) -> str:
        title = "Analysis of " + ", ".join(run.label for run in self._runs)
        has_routers = any(run.trace.routers for run in self._runs)
        parts = [*self._overview(title), *self._attention()]
        if has_routers:
            parts += [*self._load(), *self._selection(), *self._together(), *self._favourites()]
        parts += self._numbers()
        return html_page.page(title, parts, style=STYLE)

    def _overview(self, title: str) -> Iterator[str]:
        yield f"<h1>{escape(title)}</h1>"
        links = [("attention", "Attention maps")]
        if any(run.trace.routers for run in self._runs):
            links += [("load", "Load of the experts"), ("selection", "Experts over the text")]
            links += [("together", "Chosen together"), ("favourites", "Tokens of each expert")]
        links.append(("numbers", "Numbers"))
        yield "<nav>" + "".join(f'<a href="#{name}">{text}</a>' for name, text in links) + "</nav>"
        rows = [
            (
                escape(run.label),
                f"{run.step:,}{' (moving average)' * run.of_average}",
                escape(model_text(run.model)),
                str(run.model.num_layers),
                f"{run.num_parameters:,}",
                f"{len(run.tokens):,}",
                *_losses(run),
            )
            for run in self._runs
        ]
        header = ("run", "step", "model", "layers", "parameters", "tokens read", "loss (nats per token)", "perplexity")
        yield html_page.table(header, rows, numbers=(1, 3, 4, 5, 6, 7))
        yield f"<p>Text: {escape(self._text_name)}. The models were in evaluation mode: without dropout, in fp32.</p>"

    def _attention(self) -> Iterator[str]:
        yield '<h2 id="attention">Attention maps</h2>'
        yield (
            "<p>A row is a query, a column a key; a row sums to 1 within a head. The maximum over heads (as in the "
            "SwitchHead paper) shows every pair of tokens that some head connects. Colours are the same in all maps "
            "and follow the square root of the weight; grey lies in the future of the query. “▁” in a token is a "
            "blank, “⏎” a line break.</p>"
        )
        for run in self._runs:
            for sentence in run.trace.left_out:
                yield f"<p>{escape(run.title)}: {escape(sentence)}.</p>"
        for number in range(max((len(run.map_layers) for run in self._runs), default=0)):
            layers = [(run, run.map_layers[number]) for run in self._runs if number < len(run.map_layers)]
            yield f"<h3>{escape(_layers_title(layers))}</h3>"
            yield self._image(f"attention-maximum-{number}.png", "largest attention weight over heads")
            yield "<details><summary>Each head</summary>"
            for index, run in enumerate(self._runs):
                if number < len(run.map_layers):
                    name = f"attention-heads-{index}-layer-{run.map_layers[number]}.png"
                    yield self._image(name, "weights of each head")
            yield "</details>"

    def _load(self) -> Iterator[str]:
        yield '<h2 id="load">Load of the experts</h2>'
        yield (
            "<p>How often the tokens of this text chose each expert. An expert is dead here if no token chose it: with "
            "a short text that may be chance. Load max is the busiest expert's load over the mean of its head, in the "
            "worst head and layer (1 is even); entropy is that of the load over its maximum (1 is even, 0 is one "
            "expert), the mean over heads and layers.</p>"
        )
        rows = []
        for run in self._runs:
            for kind, pairs in run.kinds().items():
                dead, total = sum(c.dead for _, c in pairs), sum(c.experts for _, c in pairs)
                expected = len(run.tokens) * pairs[0][0].index.shape[2] / pairs[0][0].num_experts
                worst, mean = max(c.load_max for _, c in pairs), sum(c.entropy for _, c in pairs) / len(pairs)
                rows.append(
                    (
                        escape(run.label),
                        kind,
                        f"{total:,}",
                        f"{dead:,}",
                        f"{dead / total:.1%}",
                        f"{expected:,.0f}",
                        f"{worst:.2f}",
                        f"{mean:.3f}",
                    )
                )
        header = ("run", "router", "experts", "dead", "share dead", "tokens per expert, if even", "load max", "entropy")
        yield html_page.table(header, rows, numbers=range(2, 8))
        for index, run in enumerate(self._runs):
            if run.kinds() and len(self._runs) > 1:  # the whole name: a picture has no room for a long one
                yield f"<h3>{escape(run.title)}</h3>"
            for kind in run.kinds():
                yield self._image(f"load-{index}-{kind.replace(' ', '-')}.png", f"load of the {kind} experts")

    def _selection(self) -> Iterator[str]:
        yield '<h2 id="selection">Experts over the text</h2>'
        yield (
            "<p>Background: the first choice of the token, the expert with the largest gate. Line below: the second "
            "choice. Point at a token to see all its choices and gates. For values the token is the key's, for outputs "
            "the query's.</p>"
        )
        for index, run in enumerate(self._runs):
            for layer in run.layers if run.trace.routers else ():
                is_open = " open" if layer == run.layers[0] else ""
                yield f"<details{is_open}><summary>{escape(run.title)}: layer {layer}</summary>"
                for router, _ in run.routers_of(layer):
                    heads = router.index.shape[1]
                    for head in range(heads):
                        yield f"<h4>{router.title}{f', head {head}' if heads > 1 else ''}</h4>"
                        yield coloured_text(run, router, head)
                yield self._image(f"selection-{index}-layer-{layer}.png", "gates of the chosen experts")
                yield "</details>"

    def _together(self) -> Iterator[str]:
        yield '<h2 id="together">Experts that are chosen together</h2>'
        yield (
            "<p>Of the tokens that chose the row's expert, the share that chose the column's too, in the same head. "
            "Even choices of k of E experts would give (k - 1) / (E - 1) everywhere. The diagonal is left out, and "
            "the rows of dead experts.</p>"
        )
        for index, run in enumerate(self._runs):
            for layer in run.layers:
                name = f"together-{index}-layer-{layer}.png"
                if name in self._pictures:
                    yield f"<details><summary>{escape(run.title)}: layer {layer}</summary>"
                    yield self._image(name, "experts chosen together")
                    yield "</details>"

    def _favourites(self) -> Iterator[str]:
        yield '<h2 id="favourites">Tokens that each expert takes most</h2>'
        yield (
            "<p>Tokens with the largest excess: occurrences that chose the expert, minus those that would have if the "
            "expert took every token equally often. 7/9: seven of nine occurrences chose it.</p>"
        )
        for run in self._runs:
            names = dict(zip(run.tokens.tolist(), run.pieces, strict=True))
            for layer in run.layers if run.trace.routers else ():
                yield f"<details><summary>{escape(run.title)}: layer {layer}</summary>"
                for router, counts in run.routers_of(layer):
                    for head, of_head in enumerate(run.favourites[router.name]):
                        yield f"<h4>{router.title}{f', head {head}' if len(counts.load) > 1 else ''}</h4>"
                        rows = [
                            (str(expert), f"{counts.load[head, expert]:,}", _favourite_text(found, names))
                            for expert, found in enumerate(of_head)
                        ]
                        yield html_page.table(("expert", "tokens", "most over-represented"), rows, numbers=(0, 1))
                yield "</details>"

    def _numbers(self) -> Iterator[str]:
        yield '<h2 id="numbers">Numbers</h2>'
        yield (
            "<p>Beside this page: every picture as PNG; <code>analysis.safetensors</code> with the attention weights, "
            "the choices and gates of every token and the counts; <code>analysis.json</code> with the tokens and all "
            "else.</p>"
        )

    def _image(self, name: str, alternative: str) -> str:
        return html_page.image(self._pictures[name], alternative)


def coloured_text(run: Findings, router: RouterTrace, head: int) -> str:
    """The first tokens of the maps' window, each on the colour of its expert, and a legend of the experts."""
    tokens = run.drawn(DRAWN_TOKENS)
    spans = []
    for position in range(tokens.start, tokens.stop):
        experts, gates = router.index[position, head].tolist(), router.gates[position, head].tolist()
        style = f"background:{_colour(experts[0], router.num_experts)}"
        if len(experts) > 1:
            style += f";border-color:{_colour(experts[1], router.num_experts, dark=True)}"
        choices = ", ".join(f"expert {e} ({g:.2f})" for e, g in zip(experts, gates, strict=True))
        piece = run.pieces[position]
        hint = escape(f"token {position} {shown(piece)}: {choices}", quote=True)
        text = escape(piece).replace("\n", "⏎\n") if piece.strip() else escape(shown(piece)) + "\n" * piece.count("\n")
        spans.append(f'<span style="{style}" title="{hint}">{text}</span>')
    seen = sorted(set(router.index[tokens, head].flatten().tolist()))
    chips = "".join(
        f'<span class="chip" style="background:{_colour(e, router.num_experts)}">expert {e}</span>' for e in seen
    )
    return f'<div>{chips}</div><div class="text">{"".join(spans)}</div>'


def _colour(expert: int, num_experts: int, *, dark: bool = False) -> str:
    """Neighbouring experts differ in lightness too, so that many can be told apart."""
    lightness = (45, 32)[expert % 2] if dark else (84, 70)[expert % 2]
    return f"hsl({round(expert * 360 / num_experts)},75%,{lightness}%)"


def _favourite_text(found: Sequence[tuple[int, int, int]], names: Mapping[int, str]) -> str:
    if not found:
        return '<span class="note">dead: no token chose it</span>'
    return ", ".join(f"<code>{escape(shown(names[token]))}</code> {taken}/{of}" for token, taken, of in found)


def _layers_title(layers: Sequence[tuple[Findings, int]]) -> str:
    numbers = {layer for _, layer in layers}
    if len(numbers) == 1:
        return f"Layer {numbers.pop()}"
    return ", ".join(f"layer {layer} of {run.label}" for run, layer in layers)


def _losses(run: Findings) -> tuple[str, str]:
    loss = run.trace.loss
    return ("-", "-") if math.isnan(loss) else (f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):,.2f}")
