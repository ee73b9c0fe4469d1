"""HTML pages that work from a file without a network: one file, no script, images inside."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1500px; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.4rem 0 .4rem;
  border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem; } h4 { font-size: .95rem; margin: .9rem 0 .2rem; }
p { margin: .3rem 0 .7rem; max-width: 62rem; } img { max-width: 100%; height: auto; display: block; margin: .4rem 0; }
table { border-collapse: collapse; margin: .4rem 0 1rem; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd;
  text-align: left; vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: #555; font-size: .92rem; } code { font-size: .9em; } nav a { margin-right: 1rem; }
"""


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """The whole file. parts: HTML of the body; style: CSS besides STYLE."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{viewport}</head><body>\n{body}\n</body></html>\n'


def image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[int]) -> str:
    """header and rows: HTML. numbers: columns that are aligned right."""

    def line(cells: Sequence[str], tag: str) -> str:
        parts = [f"<{tag}{' class=n' if n in numbers else ''}>{cell}</{tag}>" for n, cell in enumerate(cells)]
        return f"<tr>{''.join(parts)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
