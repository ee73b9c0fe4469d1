"""What --config and --run-dir mean: a configuration file or a run that is there already, and the folder of the run."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import ConfigError, UserError
from common.presence import exists, is_file
from common.terminal import visible

SAVED_CONFIG = "config.json"
"""Name of the resolved configuration in a run folder."""
MARKS = ("checkpoints", "events.jsonl")
"""What only a run puts into a folder."""
SWEEP_RECORD = "sweep.json"
"""What only launch/sweep.py puts into a folder."""
FOLDERS = ("checkpoints", "tensorboard", "wandb", "routing")
"""Entries of a run folder that are folders, if they exist."""


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run: its configuration and what only a run writes."""
    return is_file(folder / SAVED_CONFIG) and any(exists(folder / mark) for mark in MARKS)


def config_file(given: str | Path, option: str = "--config") -> Path:
    """The configuration file that `given` names; for a run folder, that run's configuration. Raises ConfigError."""
    path = Path(given)
    if not str(given).strip():
        raise ConfigError(
            f"{option}: is empty; name a configuration file (the project's are in configs) or a run folder"
        )
    if not os.path.isdir(path):  # pathlib's raises for a long name
        return path
    if not is_run(path):
        raise ConfigError(f"{option}: {path} is a folder and holds no run; name a configuration file or a run folder")
    return path / SAVED_CONFIG


def run_folder(config: Path, given: str | Path | None) -> Path:
    """The run folder: `given` if it is not None, else the run whose own configuration `config` is, else runs/NAME.
    Checks, without writing, that it can be a run folder. Raises UserError."""
    folder = asked_folder(config, given)
    from pretrain.checkpoint.folder import check_output_folder  # here: readers of a run do not wait for it

    check_output_folder(folder, "--run-dir")
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # a name in an old encoding, as Latin-1: the run could save, and never continue
        raise UserError(
            f"--run-dir: {visible(str(folder))} is not UTF-8, and safetensors reads no checkpoint there; name another "
            f"folder"
        ) from None
    _check_own(folder)
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise UserError(
                f"--run-dir: {folder / name} is a file where the run needs a folder; move it away or choose another "
                f"--run-dir"
            )
    return folder


def asked_folder(config: Path, given: str | Path | None) -> Path:
    """As `run_folder`, of which nothing is checked but that it has a name."""
    if given is not None and not str(given).strip():  # runs/NAME would be another run, of which nothing was asked
        raise UserError("--run-dir: is empty; name a folder, or leave the option out for runs/NAME")
    if given is not None:
        folder = Path(given)
    elif config.name == SAVED_CONFIG and is_run(config.parent):
        folder = config.parent
    else:
        folder = Path("runs") / config.stem
    return folder.absolute()


def _check_own(folder: Path) -> None:
    """Refuses a folder that is no run and holds a file that a run replaces."""
    if any(exists(folder / mark) for mark in MARKS):
        return
    for name in (SAVED_CONFIG, "metrics.jsonl", "outcome.json"):
        if os.path.lexists(folder / name):
            raise UserError(
                f"--run-dir: {folder} holds {name}, which a run would replace, and no run (no {' and no '.join(MARKS)})"
                f"; move {name} away or choose another --run-dir"
            )
