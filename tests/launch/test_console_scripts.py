"""Console scripts run where the path of the environment has a space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.console_scripts import mend, mended

SCRIPT = b"\nimport sys\n\nprint(sys.argv[1:], sys.executable)\n"


def test_a_script_below_a_path_with_a_space_runs(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    script = folder / "deepspeed"
    script.write_bytes(f"#!{folder}/python".encode() + SCRIPT)
    script.chmod(0o755)
    assert mend(folder) == ["deepspeed"] and os.access(script, os.X_OK)
    done = subprocess.run([script, "x y", "z"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"['x y', 'z'] {folder}/python"
    assert mend(folder) == []


def test_other_scripts_keep_their_bytes() -> None:
    for first in (b"#!/usr/bin/python3", b"#!/bin/sh", b"\x7fELF a b python", b"#!/a b/bash", b'#!/a "b/python'):
        assert mended(first + SCRIPT) == first + SCRIPT
    long = b"#!/" + b"x" * 200 + b"/python"
    assert mended(long + SCRIPT).startswith(b"#!/bin/sh\n'''exec' \"/xxx")
    for length, stays in ((127, True), (128, False)):
        line = b"#!/" + b"x" * (length - 10) + b"/python"
        assert len(line) == length and (mended(line + SCRIPT) == line + SCRIPT) == stays


def test_what_a_link_of_the_environment_leads_to_is_none_of_its_scripts(tmp_path: Path) -> None:
    script, folder = tmp_path / "script", tmp_path / "bin"
    script.write_bytes(b"#!/a b/python" + SCRIPT)
    folder.mkdir()
    (folder / "script").symlink_to(script)
    assert mend(folder) == [] and script.read_bytes() == b"#!/a b/python" + SCRIPT
