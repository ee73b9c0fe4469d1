"""What git says of a checkout."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SECONDS = 20
OTHERS = re.compile(r"GIT_(DIR|WORK_TREE|COMMON_DIR|INDEX_FILE|OBJECT_DIRECTORY|PREFIX|DIFF_OPTS|.*_PATHSPECS)")
"""Variables of a hook or a shell, which may name another repository, or say how pathspecs are read."""


def git(root: Path, *words: str, good: tuple[int, ...] = (0,)) -> bytes:
    """What a command prints that git runs in the folder `root`. `good`: exit codes of success. Raises OSError without
    git, and subprocess.SubprocessError."""
    environment = {name: value for name, value in os.environ.items() if not OTHERS.fullmatch(name)}
    line = ["git", *words]
    found = subprocess.run(line, cwd=root, env=environment, capture_output=True, timeout=SECONDS, check=False)
    if found.returncode not in good:
        raise subprocess.SubprocessError(found.stderr)
    return found.stdout


def revision(root: Path) -> str | None:
    """The commit of which the folder `root` is a checkout, or a part of one. None where that is not known, as of a
    folder that lies in a checkout of something else."""
    try:
        return git(root, "rev-parse", "HEAD", "HEAD:./").split()[0].decode()
    except (OSError, subprocess.SubprocessError):
        return None
