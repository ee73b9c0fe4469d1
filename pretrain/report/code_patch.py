"""What a run's code has that its git revision has not, kept beside the run: a revision alone does not say what code a
changed tree has run."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from common.files import write_file
from common.git import git, revision
from common.paths import REPOSITORY

PACKAGES = ("common", "data_prep", "launch", "model", "pretrain")
CODE = [f"{folder}/*{kind}" for folder in PACKAGES for kind in (".py", ".cu", ".json")]
"""Git's patterns of what a run imports and reads."""
MOST_BYTES = 4 << 20
NOT_KEPT = "more than 4 MiB, not kept"
DIFF = (
    *("diff", "--binary", "--unified=3", "--no-relative", "-O/dev/null"),
    *("--no-color", "--no-ext-diff", "--no-textconv"),
)
"""Whatever the user's own git shows differences by."""


def keep_patch(run_dir: Path) -> str | None:
    """Writes the changes as `code-DIGEST.patch` into `run_dir` and returns that name: `git checkout REVISION` and `git
    apply` give the code again. NOT_KEPT where they are too large. None where nothing was changed, or where it cannot be
    known (no git, no checkout). Raises OSError."""
    patch = code_patch(REPOSITORY)
    if not patch:
        return None
    if len(patch) > MOST_BYTES:
        return NOT_KEPT
    name = f"code-{hashlib.sha256(patch).hexdigest()[:8]}.patch"
    write_file(run_dir / name, patch)
    return name


def code_patch(root: Path) -> bytes:
    """Of the checkout `root`, which may be a folder of one: changed files, and new ones that git does not ignore; cut
    off behind MOST_BYTES. Empty where git does not answer."""
    if revision(root) is None:
        return b""
    try:
        patch = git(root, *DIFF, *_prefixes(""), "HEAD", "--", *CODE)
        new = git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
        of_new = _prefixes(git(root, "rev-parse", "--show-prefix").decode().rstrip("\n"))
        for name in filter(None, new.decode().split("\0")):
            if len(patch) > MOST_BYTES:
                break
            patch += git(root, *DIFF, *of_new, "--no-index", "--", "/dev/null", name, good=(0, 1))
    except (OSError, ValueError, subprocess.SubprocessError):
        return b""
    return patch


def _prefixes(folder: str) -> tuple[str, str]:
    """`folder`: between the top of the checkout and the names that git is given."""
    return f"--src-prefix=a/{folder}", f"--dst-prefix=b/{folder}"
