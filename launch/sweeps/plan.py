"""Which runs a sweep has: every combination of configurations and values, each with a name that shows them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from common.errors import UserError
from pretrain.report.run_paths import SAVED_CONFIG, config_file, is_run
from pretrain.views.sweep import SweepRun, content_of, short_keys

MOST_LETTERS = 40
"""Of a value in a name."""
DIGITS = 6
"""Of the digest that ends a value which is cut."""
LONGEST_NAME = 200
"""Letters, all of them ASCII; file systems take 255, and a log has a few more than its run folder."""


def configurations(given: Sequence[str]) -> dict[str, Path]:
    """Name -> file of each --config. Raises UserError."""
    found: dict[str, Path] = {}
    for text in given:
        path = config_file(text)
        is_saved = path.name == SAVED_CONFIG and is_run(path.parent)
        name = _safe(path.absolute().parent.name if is_saved else path.stem)
        if not name.strip("."):  # a run's folder would be the sweep's own
            raise UserError(f"--config: {path} has no letter that can name a run folder; rename it")
        if name in found:
            raise UserError(f"--config: {found[name]} and {path} would share the name {name}; rename one of them")
        found[name] = path
    if not found:
        raise UserError("--config: is not given; name the configuration that is to be varied (--table needs none)")
    return found


def varied(given: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Key -> values of each --vary. `overrides`: of --set, which may not give the same key. Raises UserError."""
    found: dict[str, list[str]] = {}
    fixed = {override.partition("=")[0].strip() for override in overrides}
    for text in given:
        key, equals, listed = text.partition("=")
        key, values = key.strip(), values_of(listed)
        if not equals or not key or not all(values):
            raise UserError(f"--vary {text}: write it as KEY=A,B,..., e.g. optimizer.learning_rate=1e-3,2e-3")
        if key in found or key in fixed:
            raise UserError(f"--vary {key}: stands in another --vary or --set too; keep one of them")
        fixed_overlaps = (other for other in fixed if not is_entry_key(key, other))  # it is set first, then varied
        if other := next((o for o in (*found, *fixed_overlaps) if _holds(key, o) or _holds(o, key)), None):
            raise UserError(
                f"--vary {key}: overlaps with {other}, and one would replace the other; give the keys of a section "
                f"one by one"
            )
        if len({normal(value) for value in values}) < len(values):
            raise UserError(f"--vary {key}: {listed} has a value twice; keep one of them")
        found[key] = values
    return found


def _holds(section: str, key: str) -> bool:
    return key.startswith(f"{section}.")


def is_entry_key(key: str, of_list: str | None = None) -> bool:
    """Whether a key is of an entry of a list, as `data.sources.0.weight` is, and of the list `of_list` if one is
    given."""
    lists = [key[: place.start()] for place in re.finditer(r"\.[0-9]+\.", key)]
    return bool(lists) if of_list is None else of_list in lists


def values_of(text: str) -> list[str]:
    """A,B,C as a list. A comma within brackets or quotes belongs to its value."""
    values, depth, is_quoted = [""], 0, False
    for letter in text:
        if letter == '"':
            is_quoted = not is_quoted
        elif not is_quoted:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and not is_quoted:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def normal(value: str) -> str:
    """The same for values that --set reads as the same, such as 1e-3 and 0.001, or 0 and 0.0."""
    try:
        return json.dumps(json.loads(value, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):  # no JSON, or too deep for Python
        return json.dumps(value)


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


def combinations(configs: Sequence[str], values: dict[str, list[str]]) -> list[SweepRun]:
    """All of them; the last key changes fastest. Raises UserError where two would have the same name."""
    runs: dict[str, SweepRun] = {}
    for config in configs:
        for chosen in product(*values.values()):
            of_run = dict(zip(values, chosen, strict=True))
            name = run_name(config, of_run)
            if name in runs:
                raise UserError(
                    f"--vary: {_words(of_run)} and {_words(runs[name].values)} would share the run folder {name}; put "
                    f"one of them into a configuration of its own"
                )
            if len(name) > LONGEST_NAME:
                raise UserError(f"--vary: {name} is too long for the name of a folder; vary fewer keys")
            runs[name] = SweepRun(name=name, config=config, values=of_run)
    return list(runs.values())


def run_name(config: str, values: dict[str, str]) -> str:
    """`x,learning_rate=1e-3`: the short form of each key, and its value. Safe as the name of a file."""
    shown = short_keys(list(values))
    return ",".join([config, *(f"{_safe(shown[key])}={_shown(value)}" for key, value in values.items())])


def _shown(value: str) -> str:
    """What a list or a section holds, without the names of its keys: `data-c4-0.3-data-math-0.7` for two sources. What
    is too long ends in a digest of all of it, so that no two values share a name because they begin alike."""
    text = "-".join(map(_safe, content_of(value)))
    if len(text) <= MOST_LETTERS:
        return text
    digest = hashlib.sha256(normal(value).encode()).hexdigest()[:DIGITS]
    return f"{text[: MOST_LETTERS - DIGITS - 1]}-{digest}"


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text.strip('[]{}" '), flags=re.ASCII)


def _words(values: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())
