"""Tables, lists and counts as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

DOTS = "..."


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, left: Collection[int] | None = frozenset({0})
) -> str:
    """Columns two blanks apart, as wide as their widest cell. Whole numbers get thousands separators.

    header: a title for each column
    left:   numbers of the left-aligned columns, the others are right-aligned; None: all are left-aligned
    """
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def padded(number: int, cell: str) -> str:
        return cell.ljust(widths[number]) if left is None or number in left else cell.rjust(widths[number])

    return "\n".join("  ".join(padded(number, cell) for number, cell in enumerate(row)).rstrip() for row in cells)


LEAST_TITLE = 20
"""Characters of a title that are kept where a table of shorter ones would fit."""


def folded_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    width: int | None,
    left: Collection[int] = frozenset({0}),
) -> str:
    """As `text_table`, in lines of at most `width` characters: titles wider than their columns are broken at a blank
    or, where they have none, lose their middle; the columns that do not fit then stand below the others, behind the
    first one again. width: None: as wide as it is."""
    whole = text_table(header, rows, left=left)
    if width is None or len(header) < 2 or max(map(len, whole.splitlines())) <= width:
        return whole
    first = shortened_apart([header[0], *(_cell(row[0]) for row in rows)], width // 2 - 1)
    room = width - max(map(len, first))
    columns = [first[1:]]
    for number in range(1, len(header)):
        columns.append([shortened(_cell(row[number]), room - 2) for row in rows])
    most = [min(room - 2, max([LEAST_TITLE, *map(len, column)])) for column in columns[1:]]
    names = shortened_apart(header[1:], *most)
    titles = [[first[0]], *map(_broken, header[1:], most, names)]
    parts, taken = [[0]], 0
    for number in range(1, len(header)):
        wide = 2 + max(map(len, (*titles[number], *columns[number])))
        if taken + wide > room:
            parts, taken = [*parts, [0]], 0
        parts[-1].append(number)
        taken += wide
    texts = []
    for part in parts:
        high = max(len(titles[number]) for number in part)
        stacked = [[""] * (high - len(titles[number])) + titles[number] + columns[number] for number in part]
        head, *lines = zip(*stacked, strict=True)
        texts.append(text_table(head, lines, left={place for place, number in enumerate(part) if number in left}))
    return "\n\n".join(texts)


def _broken(title: str, most: int, short: str) -> list[str]:
    """In two lines of at most `most` characters, if one is too short for it; `short` if both are."""
    lines = textwrap.wrap(title, max(1, most), break_long_words=False, break_on_hyphens=False)
    return lines if 0 < len(lines) <= 2 and max(map(len, lines)) <= most else [short]


def shortened_apart(texts: Sequence[str], *most: int) -> list[str]:
    """Each as `shortened`, in at most `most` characters (one number for all, or one for each); of those that would look
    alike the part in which they differ."""
    limits = list(most) * len(texts) if len(most) == 1 else list(most)
    found = [shortened(text, limit) for text, limit in zip(texts, limits, strict=True)]
    of_cut: dict[str, set[str]] = {}
    for text, cut in zip(texts, found, strict=True):
        of_cut.setdefault(cut, set()).add(text)
    alike = [n for n, cut in enumerate(found) if len(of_cut[cut]) > 1]
    if not alike:
        return found
    different, limit = [texts[number] for number in alike], min(limits[number] for number in alike)
    begin = same_letters(different)
    left = [text[begin:] for text in different]
    end = same_letters([text[::-1] for text in left])
    room = limit - 2 * len(DOTS) - (max(map(len, left)) - end)
    begin -= min(begin, max(0, room))
    for number, text in zip(alike, different, strict=True):
        shown = DOTS * (begin > 0) + text[begin : len(text) - end] + DOTS * (end > 0)
        found[number] = shortened(shown, limit)
    return found


def same_letters(texts: Sequence[str]) -> int:
    """How many letters all of them begin with."""
    differing = (n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    return next(differing, min(map(len, texts)))


def shortened(text: str, most: int) -> str:
    """At most `most` characters, without the middle: names of runs differ at the beginning or at the end."""
    if len(text) <= most:
        return text
    kept = max(0, most - len(DOTS))
    return (text[: kept // 2] + DOTS + text[len(text) - (kept - kept // 2) :])[:most]


def beginning(text: str, most: int) -> str:
    """At most `most` characters, without the end."""
    return text if len(text) <= most else text[: max(1, most - len(DOTS))] + DOTS


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def listed(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first `most` of them, and how many more there are: `a, b and 4 more`."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {what}{'s' * (number != 1)}"
