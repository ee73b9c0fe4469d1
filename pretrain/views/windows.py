"""Which validations of a run read the same text: a resume may change that, and then their losses say nothing of each
other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.line_log import Row
from pretrain.config.validated import WINDOWS, has_effect, setting

DIGEST = " (digest)"
"""What the name of a change of the data themselves ends with, behind data.manifest or data.sources."""
DIGEST_LETTERS = 12
"""Of a digest in such a change."""

Reads = dict[str, Any]
"""Setting -> its value, of those in WINDOWS that a start has changed, and the digest of the data if one did; the same
for the same windows of the same text."""


def same_sources(one: Any, other: Any) -> bool:
    """Whether two values of data.sources name the same data sets in the same order, whatever their weights: then
    validations read the same windows."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) < 2:
        return False
    found = [[(row.get("manifest"), row.get("name")) for row in rows if isinstance(row, dict)] for rows in (one, other)]
    return found[0] == found[1]


def reads_by_step(events: Sequence[Row], split: str, config: dict[str, Any]) -> dict[int, Reads]:
    """What the validations on a split have read, by step, those that still count: a start from before a step computes
    its validation again, and those before a branch are another one's. A start records how its settings differ from
    those of the checkpoint that it goes on from: the validations before it had the earlier value. config: of the newest
    start."""
    found: dict[int, Reads] = {}
    newest: Reads = {}
    digest, is_other_mixture = None, False
    for event in events:
        kind, step, key = event["event"], event.get("step"), event.get("key")
        if kind == "validation" and event.get("split", "validation") == split and isinstance(step, int):
            found[step] = {}
        elif kind == "branch":
            found = {}
        elif kind == "started" and isinstance(step, int):
            found = {earlier: reads for earlier, reads in found.items() if earlier <= step}
            digest, is_other_mixture = event.get("data_digest"), False
        if kind != "changed_setting" or not isinstance(key, str):
            continue
        then, now = event.get("then"), event.get("now")
        if key == "data.sources" and same_sources(then, now):
            is_other_mixture = True  # whose weights alone give its digest another value
        is_data = key.endswith(DIGEST) and not is_other_mixture
        if not is_data and not (key in WINDOWS and has_effect(key, config)):
            continue
        name = "data" if is_data else key
        newest[name] = now if is_data else setting(config, key)
        for reads in found.values():
            reads.setdefault(name, then)
    if "data" in newest and isinstance(digest, str):
        newest["data"] = digest[:DIGEST_LETTERS]
    return {step: newest | reads for step, reads in sorted(found.items(), key=lambda pair: pair[0])}
