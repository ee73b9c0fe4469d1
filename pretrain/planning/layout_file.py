"""The configuration file that `plan.py search --write` makes: the user's file with the chosen layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from common.json_config import read_tree
from pretrain.config.loading import apply_override, parse_config

MADE_BY = "Layout by plan.py search"
"""How the description of such a file begins: only files that say so are written over."""


def chosen_tree(path: Path, overrides: Sequence[str], chosen: dict[str, Any], machine: str) -> dict[str, Any]:
    """The tree of the file at `path` with `--set` overrides and the chosen values on top. machine: for how many of
    which GPU, in words. Raises ConfigError."""
    tree = read_tree(path, "CONFIG")
    for override in overrides:
        apply_override(tree, override)
    for key, value in chosen.items():
        apply_override(tree, f"{key}={json.dumps(value)}")
    tree["description"] = f"{MADE_BY} for {machine}, of {path.name}. {described(tree)}".strip()
    parse_config(tree)
    return tree


def described(tree: dict[str, Any]) -> str:
    """What the user's file said of itself."""
    before = str(tree.get("description", ""))
    return before.partition(". ")[2] if before.startswith(MADE_BY) else before


def check_target(target: Path, *, force: bool) -> None:
    """Raises UserError where `target` cannot be written, or is a file that the search did not make."""
    if target.is_dir():
        raise UserError(f"--write: {target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise UserError(f"--write: there is no folder {target.parent}; make it, or name a file elsewhere")
    if target.exists() and not target.is_file():
        raise UserError(f"--write: {target} is a device or a pipe; name a file")
    if not target.exists() or force:
        return
    try:
        made = str(read_tree(target, "--write").get("description", "")).startswith(MADE_BY)
    except UserError:
        made = False
    if not made:
        raise UserError(
            f"--write: {target} is there and was not made by plan.py search; name another file, or give --force"
        )


def write_config(target: Path, tree: dict[str, Any], *, force: bool) -> None:
    """Whole or not at all. Raises UserError."""
    check_target(target, force=force)
    try:
        write_json(target, tree, indent=2)
    except OSError as error:
        raise UserError(
            f"--write: {target} cannot be written: {error.strerror}; make room, or name a file elsewhere. The table "
            f"has the layout as options"
        ) from None
