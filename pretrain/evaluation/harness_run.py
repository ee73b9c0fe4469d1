"""--harness of launch/evaluate.py: tasks of lm-evaluation-harness on a checkpoint, from the hub or from local files."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.paths import find_input
from common.strict_json import without_nan
from common.tables import counted
from pretrain.evaluation.files import json_objects
from pretrain.evaluation.likelihood import Limits
from pretrain.evaluation.models import OpenedModel
from pretrain.evaluation.results import cut_text, write_lines, write_result

TASK_FILES = Path(__file__).with_name("harness_tasks")
"""Tasks that read published files; `lm_eval --include_path` takes the folder too."""
LOCAL = "local files"
SPLITS = ("train", "validation", "test")
OURS = "switchall_"
"""What the names of these tasks begin with."""


def task_specs(text: str, shots: int | None = None) -> list[str | dict[str, Any]]:
    """--harness: names as they are; NAME=PATH with the local file, or the folder's files, in the place of the hub's.
    `shots`: --shots. Raises UserError, also if lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            '--harness: needs lm-evaluation-harness, which is not installed; install it with pip install -e ".[eval]"'
        )
    names: list[str | dict[str, Any]] = []
    local: list[dict[str, Any]] = []
    for part in text.split(","):
        name, equals, given = part.strip().partition("=")
        if not name or (equals and not given):
            raise UserError(f"--harness: {part.strip()!r} is no task; write NAME or NAME=FILE, with commas between")
        if shots and name.startswith(OURS):  # the library would take other questions, and the same one, for examples
            raise UserError(f"--shots: {name} has questions alone, and no examples before them; leave --shots out")
        path = find_input(given) if equals else None
        if path is not None and not path.exists():
            raise UserError(f"--harness: {name}: there is no {path}; name a file of JSON lines")
        if path is None:
            names.append(name)
        elif name.startswith(OURS):
            local.append({"task": name, "dataset_kwargs": {"path": str(path)}})
        else:
            local.append({"task": name, **local_data(name, path, shots)})
    # In a group, because there alone keys are put over those of a task that the library knows.
    return [*names, {"group": LOCAL, "task": local}] if local else names


def local_data(name: str, path: Path, shots: int | None) -> dict[str, Any]:
    """What replaces a task's data set by the file `path`, or by those of a folder, named train, validation and test.
    Examples that stand before a question come from another split of the data set: one file for all splits would show
    the question itself with its answer, so it has none. Raises UserError."""
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if not files:
            raise UserError(f"--harness: {name}: {path} has no train.jsonl, validation.jsonl or test.jsonl")
    elif shots:
        raise UserError(
            f"--shots: {name} reads the one file {path}, which would show a question with its answer; name a folder of "
            f"train.jsonl and test.jsonl, or leave --shots out"
        )
    else:
        files = dict.fromkeys(SPLITS, path)
    for file in set(files.values()):
        try:
            if not sum(1 for _ in json_objects(file)):
                raise UserError(f"{file}: holds no line; name a file of JSON lines")
        except UserError as error:
            raise UserError(f"--harness: {name}: {error}") from None
    data_files = {"data_files": {split: str(file) for split, file in files.items()}}
    found = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data_files}
    return found if path.is_dir() else {**found, "num_fewshot": 0}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tasks are computed."""

    limit: int | None = None
    """Only the first so many questions of each task."""
    shots: int | None = None
    """Examples before each question; None: as each task says."""
    keeps_samples: bool = False
    """Whether every question and answer is returned."""


class Found(NamedTuple):
    """What lm-evaluation-harness found."""

    tables: dict[str, Any]
    """By task: `results`, `versions`, `n-shot`, `n-samples`; and `texts_cut`, as of our tasks."""
    samples: list[dict[str, Any]]
    """Every question, with its task, what the model answered and how that counts; empty unless they are kept."""


def run_harness(opened: OpenedModel, specs: Sequence[str | dict[str, Any]], limits: Limits, options: Options) -> Found:
    """Raises UserError."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from pretrain.evaluation.harness import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(TASK_FILES))
    for name in [name for spec in specs for name in _names(spec)]:
        if not manager.match_tasks([name]):
            raise UserError(f"--harness: lm-evaluation-harness has no task {name!r}; `lm_eval ls tasks` lists them")
    model = HarnessModel(opened, limits)
    try:
        found = simple_evaluate(
            model,
            tasks=list(specs),
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=manager,
            log_samples=options.keeps_samples,
            bootstrap_iters=0,
        )
    except OSError as error:
        raise UserError(
            f"--harness: the data of a task cannot be read ({str(error).splitlines()[0]}); where no hub is reachable, "
            f"name a local file, NAME=FILE"
        ) from None
    except (DatasetsError, TemplateError, KeyError) as error:
        if all(isinstance(spec, str) for spec in specs):
            raise
        raise UserError(
            f"--harness: a local file lacks what its task reads ({type(error).__name__}: {error}); each line is a JSON "
            f"object with the fields of the task's data set"
        ) from error
    except ValueError as error:
        if "Sample larger than population" not in str(error):
            raise
        raise UserError("--harness: a task has fewer examples than it puts before a question; give --shots 0") from None
    assert found is not None
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    tables = {key: {name: of for name, of in found[key].items() if name != LOCAL} for key in kept if key in found}
    samples = [{"task": name, **one} for name, of in found.get("samples", {}).items() for one in of]
    return Found({**tables, "texts_cut": model.cut}, samples)


def _names(spec: str | dict[str, Any]) -> list[str]:
    return [spec] if isinstance(spec, str) else [task["task"] for task in spec["task"]]


def evaluate_with_harness(
    opened: OpenedModel,
    specs: Sequence[str | dict[str, Any]],
    limits: Limits,
    options: Options,
    out: Path,
) -> None:
    """Runs the tasks, prints their table and writes harness.json, and harness-samples.jsonl where samples are kept.
    Raises UserError."""
    from lm_eval.utils import handle_non_serializable, make_table

    began = time.monotonic()
    content, samples = run_harness(opened, specs, limits, options)
    print(make_table(content))
    if cut := content["texts_cut"]:
        print(f"note: {cut_text(cut, limits.context)}")
    checkpoint = opened.checkpoint
    origin = {"checkpoint": str(checkpoint.path.absolute()), "step": checkpoint.progress.step, "limit": options.limit}
    seconds = time.monotonic() - began
    path = write_result(
        out, "harness", without_nan({**content, **origin, "context": limits.context, "seconds": seconds})
    )
    print(f"{path}: the results of lm-evaluation-harness", flush=True)
    if options.keeps_samples:
        lines = [json.dumps(one, default=handle_non_serializable, ensure_ascii=False) for one in samples]
        path = write_lines(out, "harness-samples", lines)
        print(f"{path}: {counted(len(lines), 'question')} with their answers", flush=True)
