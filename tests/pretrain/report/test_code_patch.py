"""The patch beside a run, against git itself: applied to the revision it gives the code that ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pretrain.report import code_patch as patches
from pretrain.report.code_patch import code_patch, keep_patch


def git(folder: Path, *words: str) -> None:
    line = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    subprocess.run(line, cwd=folder, capture_output=True, check=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with two files of code and one of another kind."""
    tree = tmp_path / "tree"
    (tree / "model" / "attention").mkdir(parents=True)
    for name in ("model/layers.py", "model/attention/dense.py", "notes.txt"):
        (tree / name).write_text(f"first of {name}\n")
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
    (tree / "model" / "layers.py").write_text("second\n")
    git(tree, "add", "model/layers.py")
    (tree / "model" / "attention" / "dense.py").unlink()
    (tree / "model" / "attention" / "top p.py").write_text("new, with a blank in its name\n")
    (tree / "model" / "my_scratch.py").write_text("ignored\n")
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(tree, "config", key, value)
    name = keep_patch(run)
    assert name is not None and [path.name for path in run.iterdir()] == [name] and keep_patch(run) == name
    git(tmp_path, "clone", "-q", str(tree), "again")
    git(tmp_path / "again", "apply", str(run / name))
    again = tmp_path / "again"
    assert (again / "model" / "layers.py").read_text() == "second\n"
    assert [path.name for path in (again / "model" / "attention").iterdir()] == ["top p.py"]
    assert (again / "notes.txt").read_text() == "first of notes.txt\n"


def test_no_checkout_and_too_much(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    assert code_patch(bare) == b""
    (tree / "model" / "layers.py").write_text("second\n")
    monkeypatch.setattr(patches, "REPOSITORY", tree)
    monkeypatch.setattr(patches, "MOST_BYTES", 10)
    assert keep_patch(tmp_path) is None
    monkeypatch.setenv("PATH", str(bare))
    assert code_patch(tree) == b"", "a machine without git"
