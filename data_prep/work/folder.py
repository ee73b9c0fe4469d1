"""The work folder: finished pieces of every stage, so that a killed run goes on where it was.

A stage keeps its results in OUTPUT/.work/STAGE-FINGERPRINT, one file for each raw file or part. The fingerprint is a
hash of every setting that changes the results and of the versions of the code that made them, also for the stages
before. So a result that exists is valid, and another config, or newer code, never finds it. A file gets its name when
it is complete. So there is nothing to repair after a kill, and any number of processes and SLURM tasks may write into
the folder at the same time: at worst they make the same bytes twice.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

from common.errors import DataError
from common.files import temporary_path, write_json
from common.hashing import sha256_json

WORK = ".work"
CHOICE = "choice.json"
STAGE_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{16}")  # the names that `stage_folder` gives
T = TypeVar("T")


def read_json(path: Path) -> Any:
    """JSON that `write_json` left, or None if there is none. Raises DataError if it was damaged since."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{path} was damaged after it was written; remove {path.parent}") from None


def fingerprint(*settings: Any) -> str:
    """16 hex digits of the sha256 of JSON values."""
    return sha256_json(settings)[:16]


def stage_folder(work: Path, stage: str, *settings: Any) -> Path:
    """The folder of a stage with these settings, made if it is not there."""
    folder = work / f"{stage}-{fingerprint(stage, *settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_key(folder: Path) -> str:
    """What the settings of the next stage must contain: the fingerprint of this one."""
    return folder.name


def decided(path: Path, choice: bool) -> bool:
    """The choice of the process that asked first, which all later processes get too, on any node. `path` becomes a
    folder: none replaces a folder that holds something, on file systems without hard links too."""
    proposal = temporary_path(path)
    proposal.mkdir()
    try:
        write_json(proposal / CHOICE, choice)
        os.rename(proposal, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(proposal, ignore_errors=True)  # it is there if it was not moved
    first: bool = read_json(path / CHOICE)
    return first


def finished(result: T | None, what: str) -> T:
    """A result that an earlier stage must have left; DataError with what is missing if it is None."""
    if result is None:
        raise DataError(f"{what} is not finished; run the stages before with every --task of --tasks first")
    return result
