"""Streams that cannot be written: the process goes on, says so once, and its exit code stays its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
import os, sys
from pretrain.report import console
console.PATIENCE_SECONDS = 0.05
console.protect()
"""


def run(body: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", HEAD + body], cwd=ROOT, check=False, timeout=300, **streams)  # type: ignore[call-overload]


PRINTS = """
import threading
told = []
print("first line", flush=True)
console.on_problem(lambda stream, reason: told.append((stream, reason)))
for _ in range(3):
    print("x" * 10_000)
threads = [threading.Thread(target=print, args=("from a thread",)) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
open(sys.argv[1] if len(sys.argv) > 1 else os.environ["TOLD"], "w").write(repr(told))
sys.exit(5)
"""


def broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def dev_full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("make, reason", [(broken_pipe, "Broken pipe"), (dev_full, "No space left on device")])
@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_stream_that_refuses_is_told_of_once_and_the_exit_code_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, reason: str, which: str
) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    descriptor = make()  # type: ignore[operator]
    other = "stderr" if which == "stdout" else "stdout"
    body = PRINTS if which == "stdout" else "sys.stdout, kept = sys.stderr, sys.stdout\n" + PRINTS
    done = run(body, **{which: descriptor, other: subprocess.PIPE})
    os.close(descriptor)
    assert done.returncode == 5
    assert (tmp_path / "told").read_text() == repr([(which, reason)])
    if which == "stdout":
        assert done.stderr.decode().startswith(f"warning: stdout cannot be written ({reason}); the run goes on")
        assert done.stderr.count(b"\n") == 1


def test_both_streams_full_and_both_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    descriptor = dev_full()
    assert run(PRINTS, stdout=descriptor, stderr=descriptor).returncode == 5
    os.close(descriptor)
    assert (tmp_path / "told").read_text().count("No space left") == 2

    # Closed by the shell: the file that is opened next must not get the descriptor that prints go to.
    body = PRINTS + "\nassert open('/dev/null').fileno() > 2"
    line = 'exec "$0" -c "$1" >&- 2>&- <&-'
    done = subprocess.run(["bash", "-c", line, sys.executable, HEAD + body], cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 5
    assert (tmp_path / "told").read_text() == repr([("stdout", "closed"), ("stderr", "closed")])


def test_a_reader_that_stands_still_is_not_waited_for_and_hears_of_the_gap() -> None:
    body = """
for number in range(100):
    print(f"{number:05d} " + "x" * 4000, flush=True)
print("all printed", file=sys.stderr, flush=True)
sys.stdin.read()
print("after the gap", flush=True)
sys.exit(4)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + body],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    warning = process.stderr.readline()
    assert b"stdout cannot be written (its reader does not read)" in warning
    assert process.stderr.readline() == b"all printed\n"
    first = process.stdout.read(60_000)  # from now on the reader reads
    process.stdin.close()
    lines = (first + process.stdout.read()).decode().splitlines()
    assert process.wait(timeout=300) == 4
    assert lines[-1] == "after the gap" and "bytes could not be written here]" in lines[-2]
    assert lines[0].startswith("00000 ") and len(lines) < 102


def test_what_the_encoding_does_not_have_is_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + "print('\\u03c3 \\udc80')"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, b"\\u03c3 \\udc80\n")
