"""Tables of docs/ that a program writes stand between two comments: <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the two comments of `name`. Raises ValueError if it lacks them."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, mark, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not mark or not last:
        raise ValueError(f"the page lacks {begin.strip()} or {end}")
    return f"{before}{mark}{table.rstrip()}\n{end}{after}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
