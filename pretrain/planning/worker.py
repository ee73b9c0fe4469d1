"""Rehearsals in a process of their own, which lives as long as this one: the first answer waits for its imports, and
what was asked before is known.

Why apart: DeepSpeed and torch.distributed keep much in globals, and a process that trains, or will, has its own there.
The two exchange lines of JSON.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.json_config import to_json
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config
from pretrain.planning.record import Call, Rehearsal, Routed

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # tensors without data need no GPU, and must not take memory of one
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


class Request(NamedTuple):
    """The arguments of `rehearse`."""

    config: Config
    num_ranks: int
    rank: int
    device_type: str
    most_micro_steps: int | None = None
    routed: Routed = "even"

    @property
    def line(self) -> str:
        return json.dumps([to_json(self.config), *self[1:]])


class RehearsalFailed(RuntimeError):
    """The helper process died, or code of the rehearsed run raised: its traceback."""


def rehearsed(requests: Sequence[Request]) -> Iterator[Rehearsal]:
    """The rehearsals in turn, each as soon as it is there. Raises RehearsalFailed."""
    for request in requests:
        line = request.line
        if line not in _known:
            with _lock:
                _known[line] = _ask(line)
        yield _known[line]


_known: dict[str, Rehearsal] = {}
_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


def _ask(line: str) -> Rehearsal:
    global _process
    if _process is None or _process.poll() is not None:
        _process = _started()
    assert _process.stdin is not None and _process.stdout is not None
    try:
        _process.stdin.write(line + "\n")
        _process.stdin.flush()
        answer = _process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RehearsalFailed(f"the process that rehearses a step ended with code {_process.wait()}")
    found = json.loads(answer)
    if "error" in found:
        raise RehearsalFailed(found["error"])
    return _read(found)


def _started() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain.planning.worker"],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    return process


def _written(found: Rehearsal) -> dict[str, Any]:
    """As JSON: the ranks of a group, which may be thousands, once."""
    groups = list(dict.fromkeys(call.ranks for call in found.calls))
    number = {ranks: place for place, ranks in enumerate(groups)}
    calls = [call._replace(ranks=number[call.ranks]) for call in found.calls]  # type: ignore[arg-type]
    return {**found._asdict(), "groups": groups, "calls": calls}


def _read(found: dict[str, Any]) -> Rehearsal:
    groups = [tuple(ranks) for ranks in found.pop("groups")]
    calls = [Call(kind, groups[number], *others) for kind, number, *others in found.pop("calls")]
    return Rehearsal(**found, calls=calls)


def _serve(questions: IO[str], answers: IO[str]) -> None:
    for line in questions:
        try:
            from pretrain.planning.rehearsal import rehearse

            tree, num_ranks, rank, device_type, most, routed = json.loads(line)
            config = parse_config(tree)
            answer = _written(rehearse(config, num_ranks, rank, device_type, most_micro_steps=most, routed=routed))
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    _serve(sys.stdin, answers)
