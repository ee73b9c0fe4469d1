"""Tables of docs/ that a program writes stand between two comments: <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_file

TIGHT = "---"
"""What stands in a column between head and rows on most pages."""


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the two comments of `name`. Raises ValueError if it lacks them."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, mark, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not mark or not last:
        raise ValueError(f"the page lacks {begin.strip()} or {end}")
    return f"{before}{mark}{table.rstrip()}\n{end}{after}"


def rewrite(page: Path, change: Callable[[str], str], option: str) -> None:
    """Replaces the page, which `option` of a command named, by what `change` makes of its text. Raises UserError where
    it cannot be read or written, or `change` raises ValueError."""
    try:
        write_file(page, change(page.read_text(encoding="utf-8")).encode("utf-8"))
    except OSError as error:
        raise UserError(f"{option}: {page}: {error.strerror or error}") from None
    except ValueError as error:  # no marks, or no UTF-8
        raise UserError(f"{option}: {page}: {error}") from None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = " --- ") -> str:
    """A table; a | in a cell would end it."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{rule}" * len(header) + "|", *lines[1:]])
