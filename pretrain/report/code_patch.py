"""What a run's code has that its git revision has not, kept beside the run: a revision alone does not say what code a
changed tree has run."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from common.files import write_file
from common.paths import REPOSITORY

PACKAGES = ("common", "data_prep", "launch", "model", "pretrain")
CODE = [f"{folder}/*{kind}" for folder in PACKAGES for kind in (".py", ".cu", ".json")]
"""Git's patterns of what a run imports and reads."""
MOST_BYTES = 4 << 20
SECONDS = 20
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")
"""Whatever the user's own git shows differences by."""


def keep_patch(run_dir: Path) -> str | None:
    """Writes the changes as `code-DIGEST.patch` into `run_dir` and returns that name: `git checkout REVISION` and `git
    apply` give the code again. None where nothing was changed, or where it cannot be known (no git, no checkout, more
    than 4 MiB). Raises OSError."""
    patch = code_patch(REPOSITORY)
    if not patch or len(patch) > MOST_BYTES:
        return None
    name = f"code-{hashlib.sha256(patch).hexdigest()[:8]}.patch"
    write_file(run_dir / name, patch)
    return name


def code_patch(root: Path) -> bytes:
    """Of the checkout `root`: changed files, and new ones that git does not ignore. Empty where git does not answer."""
    try:
        patch = _git(root, *DIFF, "HEAD", "--", *CODE)
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
        for name in filter(None, new.decode().split("\0")):
            patch += _git(root, *DIFF, "--no-index", "--", "/dev/null", name, good=(0, 1))
    except (OSError, ValueError, subprocess.SubprocessError):
        return b""
    return patch


def _git(root: Path, *words: str, good: tuple[int, ...] = (0,)) -> bytes:
    line = ["git", "-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", *words]
    found = subprocess.run(line, cwd=root, capture_output=True, timeout=SECONDS, check=False)
    if found.returncode not in good:
        raise subprocess.SubprocessError(found.stderr)
    return found.stdout
