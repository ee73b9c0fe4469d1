from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.presence import exists, is_dir, is_file
from pretrain.checkpoint import list_checkpoints


def test_what_is_there_is_what_os_path_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "to a folder").symlink_to(tmp_path)
    (tmp_path / "to nothing").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    names = ("", "file", "missing", "file/below", "to a folder", "to nothing", "circle", "pipe", "a\0b")
    for name in names:
        path = tmp_path / name
        expected = os.path.exists(path), os.path.isdir(path), os.path.isfile(path)
        assert (exists(path), is_dir(path), is_file(path)) == expected, name


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENAMETOOLONG])
def test_what_cannot_be_looked_at_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A run whose checkpoints do not answer would begin anew."""
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    assert list_checkpoints(tmp_path) == [folder]
    stat = os.stat

    def broken(path: object, *args: object, **options: object) -> os.stat_result:
        if str(path).endswith("step-00000007"):
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", broken)
    for ask in (exists, is_dir, is_file):
        with pytest.raises(OSError, match=os.strerror(number)):
            ask(folder)
    with pytest.raises(UserError, match=f"cannot be read: {os.strerror(number)}"):
        list_checkpoints(tmp_path)
