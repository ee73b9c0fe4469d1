#!/usr/bin/env python
"""Mends the console scripts of this environment, for paths with a space: python launch/console_scripts.py

The first line of a script names its interpreter, and Linux takes a space there for the end of the name. pip writes its
own scripts so that /bin/sh finds the interpreter; a script that a package brings ready, as DeepSpeed does, it only
gives that first line. `make install` ends with this. Uses the standard library alone.
"""

import argparse
import sys
from pathlib import Path

LONGEST = 127
"""Bytes of a first line that every Linux reads."""


def mended(script: bytes) -> bytes:
    """`script` in Python with a first line that the system can read; the same bytes where it can already, or where
    quotes in the path leave no way."""
    first, newline, rest = script.partition(b"\n")
    interpreter = first.removeprefix(b"#!").strip()
    is_python = first.startswith(b"#!/") and b"python" in interpreter
    is_readable = b" " not in interpreter and len(first) <= LONGEST
    if not is_python or is_readable or set(interpreter) & set(b"\"'$`\\"):
        return script
    # For the shell a command, for Python a string.
    return b"#!/bin/sh\n'''exec' \"" + interpreter + b'" "$0" "$@"\n' + b"' '''" + newline + rest


def mend(folder: Path) -> list[str]:
    """Rewrites the scripts in `folder` that need it. Returns their names."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            before = path.read_bytes()
            after = mended(before)
            if after != before:
                path.write_bytes(after)  # its mode stays
                names.append(path.name)
    return names


def main() -> int:
    argparse.ArgumentParser(prog="launch/console_scripts.py", description=(__doc__ or "").splitlines()[0]).parse_args()
    mend(Path(sys.executable).parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
