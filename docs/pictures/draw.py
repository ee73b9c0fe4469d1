"""Draws rooms.svg and step.svg, the pictures of docs/architecture.md, beside this file.

    python docs/pictures/draw.py

Boxes stand in rows. An arrow is straight where two boxes face each other. tests/test_pictures.py compares the rooms and
the arrows with tests/test_rooms.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
WIDTH, ROW, STEP = 960, 40, 64
"""Of the picture, height of a box, and from one row of boxes to the next; pixels."""
STYLE = (
    "text{font:12.5px sans-serif;text-anchor:middle;fill:#222}.note{font-size:11px;fill:#555}"
    ".title{font-size:15px;font-weight:bold;text-anchor:start}.subtitle{font-size:12px;text-anchor:start;fill:#444}"
    ".panel{fill:#f3f6fa;stroke:#8fa6c4}.folder{fill:#cfe0f6;stroke:#4a76b8}.file{fill:#fff;stroke:#8a8a8a}"
    ".arrow{stroke:#444;stroke-width:1.3;fill:none;marker-end:url(#head)}"
)
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>'
)
Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle with one or two lines of text; all lengths in pixels."""

    name: str
    x: float
    y: float
    width: float
    height: float
    label: str
    note: str = ""
    kind: str = "folder"

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def svg(self) -> str:
        shape = (
            f'<rect class="{self.kind}" x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}"'
        )
        return f'<g id="{escape(self.name)}">\n{shape} rx="4"/>\n{self._text()}\n</g>'

    def _text(self) -> str:
        if self.kind == "panel":
            x, y = self.x + 12, self.y + 21
            title = f'<text class="title" x="{x:g}" y="{y:g}">{escape(self.label)}</text>'
            space = 12 + 9 * len(self.label)
            return f'{title}<text class="subtitle" x="{x + space:g}" y="{y:g}">{escape(self.note)}</text>'
        x, y = self.x + self.width / 2, self.y + self.height / 2 + 4.5
        if not self.note:
            return f'<text x="{x:g}" y="{y:g}">{escape(self.label)}</text>'
        lines = [f'<text x="{x:g}" y="{y - 8:g}">{escape(self.label)}</text>']
        lines.append(f'<text class="note" x="{x:g}" y="{y + 7:g}">{escape(self.note)}</text>')
        return "".join(lines)


def row(cells: Sequence[tuple[str, str, str]], left: float, top: float, width: float, gap: float = 12) -> list[Box]:
    """Boxes of equal width side by side. A cell: name (a path with dots or slashes), label, note."""
    each = (width - gap * (len(cells) - 1)) / len(cells)
    return [
        Box(name, left + i * (each + gap), top, each, ROW, label, note, kind(name))
        for i, (name, label, note) in enumerate(cells)
    ]


def kind(name: str) -> str:
    return "folder" if (FOLDER.parents[1] / name.replace(".", "/")).is_dir() else "file"


def between(a: Box, b: Box) -> list[Point]:
    """From a border of `a` to one of `b`: straight where they face each other, else from below to above."""
    left, right = max(a.x, b.x), min(a.right, b.right)
    top, bottom = max(a.y, b.y), min(a.bottom, b.bottom)
    if right - left >= 16:
        x = (left + right) / 2
        return [(x, a.bottom), (x, b.y)] if a.bottom <= b.y else [(x, a.y), (x, b.bottom)]
    if bottom - top >= 16:
        y = (top + bottom) / 2
        return [(a.right, y), (b.x, y)] if a.right <= b.x else [(a.x, y), (b.right, y)]
    aside = b.width / 4 if a.x > b.x else -b.width / 4  # so that two arrows to one box end apart
    return [(a.x + a.width / 2, a.bottom), (b.x + b.width / 2 + aside, b.y)]


def arrow(name: str, points: Sequence[Point]) -> str:
    path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
    return f'<path class="arrow" id="{escape(name)}" d="{path}"/>'


def picture(title: str, height: float, boxes: Sequence[Box], arrows: Sequence[str], rest: Sequence[str] = ()) -> str:
    """A whole file, on white, so that it is legible on a dark page too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>'
    parts = [head, f"<style>{STYLE}</style>", HEAD, ground, *(box.svg() for box in boxes), *arrows, *rest, "</svg>"]
    return "\n".join(parts) + "\n"


Cell = tuple[str, str]
PRETRAIN: list[list[Cell]] = [
    [("smoke", "a trial on these nodes"), ("cli", "command lines")],
    [("loop", ""), ("segment_start", ""), ("segment", ""), ("preflight", "what can be wrong")],
    [("resume", ""), ("resumed_stages", ""), ("evaluate", ""), ("together", ""), ("saving", "")],
    [
        ("trainer", ""),
        ("api", ""),
        ("export", "transformers"),
        ("evaluation", "published tasks"),
        ("resilience", "signals, hangs"),
    ],
    [
        ("generation", "texts"),
        ("analysis", "maps, experts"),
        ("views", "pages, tables"),
        ("report", "numbers, boards"),
        ("routing", "record, replay"),
    ],
    [
        ("saved_model", "opens a run"),
        ("imports", "foreign weights"),
        ("checkpoint", "write, read, check"),
        ("planning", "memory, time"),
    ],
    [("engine", "DeepSpeed, optimizer, micro-steps")],
    [("parallel", "groups, layouts, agreement"), ("data", "which token comes when")],
    [("late_reading", ""), ("device", ""), ("gpus", ""), ("ranks", ""), ("phases", "")],
    [("config", "every key and rule")],
]
"""Rows of rooms with what is in them. Read row by row they are the order of tests/test_rooms.py backwards: the lowest
room comes last."""
DATA_PREP: list[list[Cell]] = [
    [("cli", "run, verify, stats, show")],
    [("report", "what was made")],
    [("run", "stages in order, publishing")],
    [("stages", "ingest, filter, ... shard")],
    [("config", "every key")],
    [("work", "parts, processes")],
    [("shards", "the format, reader, writer")],
    [("raw", "files, URLs, archives")],
]
MODEL: list[list[Cell]] = [
    [("counted_costs", ""), ("costs", ""), ("decoding", ""), ("language_model", ""), ("initialization", "")],
    [("parameters", ""), ("layers", ""), ("feedforward", "sigma-MoE"), ("attention", "SwitchHead"), ("recompute", "")],
    [("balance", ""), ("routing_table", ""), ("choices", ""), ("routing", ""), ("documents", ""), ("kernels", "ops")],
    [("linear", ""), ("parallel", "collectives"), ("parameter_spec", ""), ("memory", ""), ("distributions", "")],
    [("dropout", ""), ("cache", ""), ("openmp", ""), ("config", ""), ("layer_section", "")],
]
IMPORTS = {
    "pretrain": (
        "smoke loop, cli preflight, segment resume, segment evaluate, segment saving, "
        "evaluate trainer, api generation, evaluation report, resilience report, "
        "generation saved_model, analysis saved_model, report checkpoint, report planning, checkpoint engine, "
        "planning engine, engine parallel, engine data, parallel device, device config"
    ),
    "data_prep": "cli report, report run, run stages, stages config, config work, config shards, shards raw",
    "model": (
        "language_model layers, layers feedforward, "
        "feedforward kernels, attention kernels, choices routing, kernels parallel, "
        "linear parallel, parallel parameter_spec, documents kernels"
    ),
}
"""Some of the imports, for each package: from a room to one below it."""
PACKAGES = (("launch", "pretrain"), ("launch", "data_prep"), ("pretrain", "model"), ("model", "common"))
LEGEND = (
    "Blue is a folder, white is a file.",
    "A room may import the rooms below it,",
    "and in its row those to its right.",
    "Arrows are some of the imports.",
    "pretrain/ imports nothing of data_prep/",
    "but shards/.",
)


def rooms() -> str:
    """Who may import whom."""
    left, right, wide = 16.0, 660.0, 616.0
    narrow, height, below = WIDTH - 16 - right, 30 + STEP * len(PRETRAIN), 30 + STEP * len(DATA_PREP)
    panels = {
        "launch": Box("launch", left, 16, WIDTH - 32, ROW, "launch/", "entry points; slurm/ submits jobs"),
        "pretrain": Box("pretrain", left, 88, wide, height, "pretrain/", "how a model is trained", "panel"),
        "data_prep": Box("data_prep", right, 88 + STEP, narrow, below, "data_prep/", "raw files to shards", "panel"),
    }
    top = panels["pretrain"].bottom + 32
    panels["model"] = Box("model", left, top, wide, 30 + STEP * len(MODEL), "model/", "what is computed", "panel")
    low = panels["model"].bottom + 32
    panels["common"] = Box("common", left, low, WIDTH - 32, ROW, "common/", "files, hashes, errors, locks, JSON")
    inside = [
        *tiers("pretrain", PRETRAIN, panels["pretrain"]),
        *tiers("data_prep", DATA_PREP, panels["data_prep"]),
        *tiers("model", MODEL, panels["model"]),
    ]
    named = panels | {box.name: box for box in inside}
    pairs = [*PACKAGES, ("pretrain.data", "data_prep.shards")]
    pairs += [(f"{p}.{a}", f"{p}.{b}") for p, text in IMPORTS.items() for a, b in map(str.split, text.split(", "))]
    arrows = [arrow(f"{a}--{b}", between(named[a], named[b])) for a, b in pairs]
    edge = panels["data_prep"].right - 20
    arrows.append(arrow("data_prep--common", [(edge, panels["data_prep"].bottom), (edge, low)]))
    legend = [
        f'<text class="subtitle" x="{right:g}" y="{top + 26 + 22 * i:g}">{escape(line)}</text>'
        for i, line in enumerate(LEGEND)
    ]
    title = "Rooms of the code and what they import"
    return picture(title, panels["common"].bottom + 16, [*named.values()], arrows, legend)


def tiers(package: str, rows: Sequence[Sequence[Cell]], panel: Box) -> list[Box]:
    """The rooms of a package in its panel."""
    found = []
    for number, cells in enumerate(rows):
        width = (panel.width - 28) * (0.42 if cells[0][0] == "work" else 1)  # beside it an arrow goes down to shards
        named = [(f"{package}.{name}", name + "/" * is_folder(package, name), note) for name, note in cells]
        found += row(named, panel.x + 14, panel.y + 34 + STEP * number, width)
    return found


def is_folder(package: str, name: str) -> bool:
    return kind(f"{package}.{name}") == "folder"


FLOW: list[list[tuple[str, str]]] = [
    [
        ("data_prep/shards/reader.py", "shards of token ids"),
        ("pretrain/data/order.py", "windows, and which is next"),
        ("pretrain/data/prefetch.py", "micro-batches, read ahead"),
        ("pretrain/resilience/control.py", "every rank has its batch"),
    ],
    [
        ("model/layers.py", "embedding, blocks"),
        ("model/attention/switchhead.py", "SwitchHead attention"),
        ("model/feedforward/sigma_moe.py", "sigma-MoE"),
        ("model/kernels/ops/linear_cross_entropy.py", "head and loss"),
    ],
    [
        ("pretrain/engine/build.py", "gradients, ZeRO"),
        ("pretrain/engine/gradient_norm.py", "norm, clipping"),
        ("pretrain/engine/optimizer.py", "AdamW"),
        ("pretrain/engine/step_sums.py", "sums over ranks"),
    ],
    [
        ("pretrain/late_reading.py", "the step before is read"),
        ("pretrain/report/monitor.py", "metrics, boards, terminal"),
        ("pretrain/evaluate.py", "now and then: validation"),
        ("pretrain/checkpoint/", "now and then: checkpoint"),
    ],
]
"""Rows of what a step does: the file that does it, and what."""
LAUNCH = "pretrain/trainer.py: a whole optimizer step, at its learning rate"
MICRO = "engine/micro_steps.py: forward and backward; or pipeline.py, graphed.py (CUDA graphs), compiled.py"


def step() -> str:
    """What a step does, from shards to its line of metrics.jsonl."""
    left, wide, gap = 16.0, WIDTH - 32.0, 34.0
    inner = Box("pretrain/engine/micro_steps.py", left + 16, 152, wide - 32, 86, "each micro-step", MICRO, "panel")
    outer = Box("pretrain/trainer.py", left, 112, wide, 232, "Trainer.launch", LAUNCH, "panel")
    tops, margins = (32, 184, 278, 376), (16, 32, 32, 16)
    rows = [
        row([(name, label, short(name)) for name, label in cells], left + margin, top, wide - 2 * margin, gap)
        for cells, top, margin in zip(FLOW, tops, margins, strict=True)
    ]
    arrows = [(a, b) for boxes in rows for a, b in pairwise(boxes)]
    arrows += [(rows[0][-1], outer), (inner, rows[2][0]), (outer, rows[3][0])]
    boxes = [outer, inner, *(box for boxes in rows for box in boxes)]
    lines = [arrow(f"{a.name}--{b.name}", between(a, b)) for a, b in arrows]
    return picture("The data flow of one step", rows[3][0].bottom + 16, boxes, lines)


def short(name: str) -> str:
    """The end of a path, which fits into a box."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def main() -> None:
    for name, text in {"rooms": rooms(), "step": step()}.items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
