"""Prompts from files and from standard input."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import UserError
from common.utf8 import decoded, name_of, read_bytes


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(prompt, what messages call it): every line that is not blank, or of FILE.jsonl the key `prompt` of every line;
    `-` is standard input. Raises UserError."""
    name, found = name_of(path), []
    lines = _content(path, "--prompts").split("\n")
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        place = f"--prompts: line {number} of {name}"
        if not line.strip():
            continue
        found.append((_prompt_of(line, place) if path.suffix == ".jsonl" else line, place))
    if not found:
        raise UserError(f"--prompts: {name} has no line with a prompt; write one into each line")
    return found


def read_text(option: str) -> str:
    """All of standard input as one prompt, without the end of its last line. Raises UserError."""
    return _content(Path("-"), option).removesuffix("\n").removesuffix("\r")


def _prompt_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{place} is no JSON ({error}); write {{"prompt": "..."}}') from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{place} has no text under the key prompt; write {{"prompt": "..."}}')
    return prompt


def _content(path: Path, option: str) -> str:
    return decoded(read_bytes(path, option), path, option)
