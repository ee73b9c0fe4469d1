"""The patch beside a run, against git itself: applied to the revision it gives the code that ran."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common import git as common_git
from common.git import revision
from pretrain.report import code_patch as patches
from pretrain.report.code_patch import NOT_KEPT, code_patch, keep_patch

SECOND = "a line\n" * 4 + "second\n" + "a line\n" * 5
ODD = (
    *(("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false"), ("diff.context", "0")),
    *(("diff.relative", "true"), ("diff.dstPrefix", "x/"), ("diff.orderFile", "gone")),
)


def git(folder: Path, *words: str) -> None:
    line, own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], {"PATH": os.environ["PATH"]}
    subprocess.run(line, cwd=folder, capture_output=True, check=True, env=own)


def applied(top: Path, patch: Path) -> Path:
    """What the patch makes of the revision of `top`."""
    again = top.with_name("again")
    git(top.parent, "clone", "-q", str(top), str(again))
    git(again, "apply", str(patch))
    return again


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with two files of code and one of another kind."""
    tree = tmp_path / "tree"
    (tree / "model" / "attention").mkdir(parents=True)
    for name in ("model/layers.py", "model/attention/dense.py", "notes.txt"):
        (tree / name).write_text(f"first of {name}\n" + "a line\n" * 9)
    (tree / ".gitignore").write_text("*_scratch.py\n")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "a")
    return tree


def test_a_patch_gives_the_code_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed, staged, removed and new files, and whatever git is configured to print."""
    monkeypatch.setattr(patches, "REPOSITORY", tree)
    run = tmp_path / "run"
    run.mkdir()
    (tree / "notes.txt").write_text("of no run\n")
    assert keep_patch(run) is None and not any(run.iterdir())
    (tree / "model" / "layers.py").write_text(SECOND)
    git(tree, "add", "model/layers.py")
    (tree / "model" / "attention" / "dense.py").unlink()
    (tree / "model" / "attention" / "top p.py").write_text("new, with a blank in its name\n")
    (tree / "model" / "my_scratch.py").write_text("ignored\n")
    for setting in ODD:
        git(tree, "config", *setting)
    for name in ("GIT_DIR", "GIT_NOGLOB_PATHSPECS", "GIT_DIFF_OPTS"):  # of a hook, and of a shell
        monkeypatch.setenv(name, "-u0")
    name = keep_patch(run)
    assert name is not None and [path.name for path in run.iterdir()] == [name] and keep_patch(run) == name
    again = applied(tree, run / name)
    assert (again / "model" / "layers.py").read_text() == SECOND
    assert [path.name for path in (again / "model" / "attention").iterdir()] == ["top p.py"]
    assert (again / "notes.txt").read_text().startswith("first of notes.txt\n")


def test_no_checkout_and_too_much(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    assert code_patch(bare) == b""
    (tree / "model" / "layers.py").write_text("second\n")
    monkeypatch.setattr(patches, "REPOSITORY", tree)
    monkeypatch.setattr(patches, "MOST_BYTES", 10)
    assert keep_patch(tmp_path) == NOT_KEPT and not list(tmp_path.glob("*.patch"))
    monkeypatch.setenv("PATH", str(bare))
    assert code_patch(tree) == b"" and revision(tree) is None, "a machine without git"


def test_what_says_that_a_checkout_is_safe_reaches_git(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, as a variable."""
    for name, value in (("COUNT", "1"), ("KEY_0", "safe.directory"), ("VALUE_0", "*")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert common_git.git(tree, "config", "safe.directory") == b"*\n"


def test_a_folder_of_another_checkout(tree: Path, tmp_path: Path) -> None:
    """Of one that has the code its patch has all names from the top; one that does not have it says nothing."""
    (tree / "model" / "layers.py").write_text("second\n")
    (tree / "model" / "new.py").write_text("new\n")
    assert revision(tree / "model" / "attention") == revision(tree) != None  # noqa: E711
    (tree / ".gitignore").write_text("mine\n")
    for name in ("mine", "yours"):
        (tree / name / "model").mkdir(parents=True)
        (tree / name / "model" / "layers.py").write_text("of somebody else\n")
        assert revision(tree / name) is None and code_patch(tree / name) == b"", name
    top = tmp_path / "top"
    inner = top / "third party" / "code"
    inner.parent.mkdir(parents=True)
    tree.rename(inner)
    (inner / ".git").rename(top / ".git")
    git(top, "add", ".")
    git(top, "commit", "-qm", "b")
    git(top, "config", "diff.relative", "true")
    (inner / "model" / "layers.py").write_text("third\n")
    (inner / "model" / "newer.py").write_text("")
    (tmp_path / "patch").write_bytes(code_patch(inner))
    found = applied(top, tmp_path / "patch") / "third party" / "code" / "model"
    assert (found / "layers.py").read_text() == "third\n" and (found / "newer.py").read_text() == ""
