"""The filter stage: a verdict for every document of every part, with counts and examples."""

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from common.files import write_file, write_json
from data_prep.config.schema import FilterConfig
from data_prep.stages.c4_rules import clean_page
from data_prep.stages.filters import RULES, Filters
from data_prep.work.folder import read_json
from data_prep.work.parts import Part, read_documents, read_index

EXCERPT_CHARACTERS = 300
LINES = "c4 lines"  # the rule that changes documents, among the examples


@dataclass(frozen=True, kw_only=True)
class FilterTask:
    config: FilterConfig
    part: Part
    ingest: Path
    folder: Path


@lru_cache(maxsize=1)  # per process: loading the language model takes 1 s
def _filters(config: FilterConfig) -> Filters:
    return Filters(config)


def filter_part(task: FilterTask) -> None:
    """Writes PART.safetensors, uint8 `rule` [documents] (0 keeps, else 1 + position in RULES), and PART.json with
    counts by rule, the lines that c4_lines dropped, and examples."""
    filters = _filters(task.config)
    index = read_index(task.ingest, task.part.name)
    rules = np.zeros(task.part.documents, np.uint8)
    counts: dict[str, int] = {}
    samples: dict[str, Samples] = {}
    lines = 0
    for number, data in enumerate(read_documents(task.ingest, task.part.name, index.size)):
        text = data.decode("utf-8")
        found = []  # (rule, detail, excerpt)
        if task.config.c4_lines and (gone := clean_page(text).dropped):
            lines, of = lines + len(gone), len(text.splitlines())
            found.append((LINES, f"{len(gone)} of {of} lines", "\n".join(gone)))
        verdict = filters.verdict(text)
        if verdict is not None:
            rules[number] = 1 + RULES.index(verdict[0])
            counts[verdict[0]] = counts.get(verdict[0], 0) + 1
            found.append((*verdict, text))
        for rule, detail, excerpt in found:
            line = {
                "rule": rule,
                "detail": detail,
                "file": task.part.file_of(number),
                "position": int(index.position[number]),
                "bytes": len(data),
                "excerpt": excerpt[:EXCERPT_CHARACTERS],
            }
            keep_sample(samples.setdefault(rule, []), int(index.hash[number, 0]), line, task.config.samples)
    write_file(task.folder / f"{task.part.name}.safetensors", safetensors.numpy.save({"rule": rules}))
    examples = {rule: sorted_samples(kept) for rule, kept in sorted(samples.items())}
    write_json(task.folder / f"{task.part.name}.json", {"counts": counts, "lines": lines, "samples": examples})


Samples = list[tuple[int, str]]  # a heap of (-hash, line as JSON)


def keep_sample(kept: Samples, key: int, line: dict[str, Any], count: int) -> None:
    """Keeps the `count` lines with the smallest hash: a sample that does not depend on the order of work."""
    heapq.heappush(kept, (-key, json.dumps(line)))
    if len(kept) > count:
        heapq.heappop(kept)


def sorted_samples(kept: Samples) -> list[tuple[int, dict[str, Any]]]:
    """(hash, line) of the kept lines, the smallest hash first."""
    return [(-key, json.loads(line)) for key, line in sorted(kept, reverse=True)]


def filtered_out(folder: Path, part: Part) -> np.ndarray:
    """bool [documents]: which documents of a part a rule dropped."""
    rules: np.ndarray = safetensors.numpy.load_file(folder / f"{part.name}.safetensors")["rule"]
    return rules > 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the filters did to all parts."""

    counts: dict[str, int]
    """Documents dropped by each rule, in the order of RULES."""
    lines: int
    """Lines dropped from documents."""
    samples: list[dict[str, Any]]
    """Examples, rule by rule."""


def summary(tasks: Sequence[FilterTask]) -> Summary:
    """The sums over all parts, and examples among theirs."""
    counts: dict[str, int] = {}
    lines = 0
    samples: dict[str, Samples] = {}
    for task in tasks:
        body = read_json(task.folder / f"{task.part.name}.json")
        lines += body["lines"]
        for rule, count in body["counts"].items():
            counts[rule] = counts.get(rule, 0) + count
        for rule, kept in body["samples"].items():
            for key, line in kept:
                keep_sample(samples.setdefault(rule, []), key, line, task.config.samples)
    return Summary(
        counts={rule: counts[rule] for rule in RULES if rule in counts},
        lines=lines,
        samples=[line for rule in (*RULES, LINES) for _, line in sorted_samples(samples.get(rule, []))],
    )
