"""Run folders beside the paper: which published model a run is, how far it is, and what its weights gave."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reproduce.published import config_of, names, tokens_wanted
from common import json_config
from common.errors import ConfigError, UserError
from model.config import ModelConfig, SigmaMoEConfig
from pretrain.config.keys import flatten
from pretrain.config.loading import to_json
from pretrain.config.resume_rules import free_keys
from pretrain.views.reading import LOGS, RunView, State, read_object, setting

OTHER_VALUES = re.compile(r"(\w+)\.json with other values of ")
"""How the description of a run begins whose command had --set."""
READ_FROM = ("evaluate.sequences", "evaluate.placement", "evaluate.streams")
"""Free in a run that goes on, but they decide what the figure is of."""


@dataclass(frozen=True)
class PaperRun:
    """A run of a model of configs/paper."""

    name: str
    view: RunView

    @property
    def tokens(self) -> int:
        """Seen until now."""
        found = self.view.metrics.newest.get("tokens", 0)
        return found if isinstance(found, int) else 0

    @property
    def is_whole(self) -> bool:
        """Whether it saw all tokens of the published run."""
        return self.tokens >= tokens_wanted(self.name)

    def loss(self, split: str, memory_chunks: int | None = None) -> tuple[int, float] | None:
        """Step and nats per token of the newest validation on a split: of the run itself, or launch/evaluate.py's.
        `memory_chunks`: with more memory than in training, so of launch/evaluate.py alone."""
        own = self.view.validations(split) if memory_chunks is None else []
        return max([*own, *self._evaluations(split, memory_chunks)], key=lambda found: found[0], default=None)

    def _evaluations(self, split: str, memory_chunks: int | None) -> Iterator[tuple[int, float]]:
        files = ("validation", "test")  # the first had the results of both splits once
        for one in self._evaluated(*(files if memory_chunks is None else (f"{split}-memory-{memory_chunks}",))):
            if one.get("split") == split and isinstance(one.get("loss"), float):
                yield one["step"], one["loss"]

    def accuracy(self, task: str) -> tuple[int, float] | None:
        """Step and percent of the newest evaluation of a task: of the run itself, or launch/evaluate.py's."""
        own = self.view.tasks().get(task)
        limit = setting(self.view.config, "evaluate.tasks_limit")  # of runs whose events have none
        is_whole = own is not None and not own.get("limit", limit)
        every = [*([own] if own is not None and is_whole else []), *self._evaluated(task)]
        found = [(one["step"], 100 * one["accuracy"]) for one in every if isinstance(one.get("accuracy"), float)]
        return max(found, key=lambda one: one[0], default=None)

    def _evaluated(self, *files: str) -> list[dict[str, Any]]:
        """What launch/evaluate.py left in files of these names, the newest first: all examples, with the weights
        themselves."""
        folder = self.view.path / "evaluation"
        found = [read_object(path) for file in files for path in sorted(folder.glob(f"*/{file}.json"))]
        whole = [
            one
            for one in found
            if isinstance(one.get("step"), int) and one.get("limit") is None and not one.get("moving_average")
        ]
        return sorted(whole, key=_time, reverse=True)

    @property
    def progress(self) -> str:
        """Why it has not seen all tokens, in words."""
        state, step = self.view.state, f"after step {self.view.step:,}"
        if state is State.FINISHED:
            return f"ended {step}, as it was told"
        return f"{state.value} {step}"

    def differences(self) -> list[str]:
        """What changes the result and is not the published configuration's: keys, and the rest in words."""
        mine, published = flatten(self.view.config), flatten(to_json(config_of(self.name)))
        ignored = free_keys() - set(READ_FROM)
        keys = [
            key
            for key in published
            if key in mine and mine[key] != published[key] and not any(_is_under(key, one) for one in ignored)
        ]
        manifest = mine.get("data.manifest")
        if not isinstance(manifest, str) or _corpus(manifest) != _corpus(published["data.manifest"]):
            keys.append(f"data.manifest ({manifest})")
        return keys + self._regularised()

    def _regularised(self) -> list[str]:
        """The entropy regulariser over one micro-step sees fewer sequences than the published one's whole batch."""
        layer, batch = config_of(self.name).model.feedforward, config_of(self.name).batch
        if not isinstance(layer, SigmaMoEConfig) or layer.entropy_scope != "micro_batch" or not layer.entropy_weight:
            return []
        ranks, micro = self.view.last("started").get("ranks"), setting(self.view.config, "batch.micro_sequences")
        parallel = setting(self.view.config, "parallel") or {}
        if not isinstance(ranks, int) or not isinstance(micro, int):
            return []
        seen = micro * ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
        return [] if seen >= batch.global_sequences else [f"entropy over {seen} of {batch.global_sequences} sequences"]


def _time(result: dict[str, Any]) -> float:
    time = result.get("time")
    return time if isinstance(time, int | float) else 0.0


@dataclass(frozen=True)
class Unknown:
    """A run folder that is no row of the paper."""

    path: Path
    reason: str


def found_runs(folders: Sequence[Path]) -> tuple[list[PaperRun], list[Unknown]]:
    """Every run in or below the folders, each once. Raises UserError where a folder is missing or holds no run."""
    runs, unknown = [], []
    for path in dict.fromkeys(path for folder in folders for path in run_folders(folder)):
        view = RunView.open(path)
        try:
            runs.append(PaperRun(recognised(view), view))
        except UserError as error:
            unknown.append(Unknown(path, str(error)))
    return runs, unknown


def run_folders(folder: Path) -> list[Path]:
    """`folder`, if it is a run folder, else those below it. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"--runs: there is no folder {folder}; name run folders, or a folder of them")
    found = []
    for place, below, files in os.walk(folder):
        if any(name in files for name in LOGS):
            found.append(Path(place))
            below.clear()
        below.sort()
    if not found:
        raise UserError(f"--runs: {folder} holds no run folder: nothing in it has one of {', '.join(LOGS)}")
    return found


def recognised(view: RunView) -> str:
    """The file of configs/paper that a run was started from: the one with the same model section; among corpora the
    description decides, or else the folder of its data. Raises UserError, with the reason, if it is none."""
    tree = setting(view.config, "model")
    if not isinstance(tree, dict):
        raise UserError("its config.json has no model section, or cannot be read")
    try:
        model = json_config.validate(ModelConfig, tree)
    except ConfigError as error:
        raise UserError(f"its model section is not one of this version ({error})") from None
    same = [name for name in names() if config_of(name).model == model]
    if not same:
        raise UserError("its model section is that of no file in configs/paper")
    return _of_corpus(view, same)


def _of_corpus(view: RunView, same: list[str]) -> str:
    """The one of several models that are alike but for their corpus."""
    description, manifest = view.config.get("description"), setting(view.config, "data.manifest")
    text = description if isinstance(description, str) else ""
    changed = OTHER_VALUES.match(text)
    for name in same:
        if text == config_of(name).description or (changed is not None and changed.group(1) == name):
            return name
    corpora = {name: Path(str(config_of(name).data.manifest)).parent.name for name in same}
    parts = Path(manifest).parts if isinstance(manifest, str) else ()
    fitting = [name for name, corpus in corpora.items() if corpus in parts]
    if len(fitting) != 1:
        raise UserError(
            f"its model is that of {', '.join(same)}: neither its description nor data.manifest says which corpus; "
            f"train with data in a folder named as in configs/paper"
        )
    return fitting[0]


def figure(loss: float, *, bits: bool) -> str:
    """Perplexity, or bits per character where a token is one."""
    if not math.isfinite(loss):
        return "not finite"
    return f"{loss / math.log(2):.3f}" if bits else f"{math.exp(min(loss, 700.0)):.2f}"


def _corpus(manifest: str) -> tuple[str, ...]:
    """The last two folders, as paper/c4: the corpus, wherever the prepared data lie."""
    path = Path(manifest)
    return (path.parent if path.suffix == ".json" else path).parts[-2:]


def _is_under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")
