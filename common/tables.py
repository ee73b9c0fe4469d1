"""Tables of plain text for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {what}{'s' * (number != 1)}"
