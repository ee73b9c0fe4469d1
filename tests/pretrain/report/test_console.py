"""Streams that cannot be written: the process goes on, says so once, and its exit code stays its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.report import console

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
import os, sys
from pretrain.report import console
console.PATIENCE_SECONDS = 0.05
console.protect(is_run=True)
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


class Descriptor:
    """In place of a stream: writes that fit, and whether it says that one would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_ready, self.error = True, None  # type: bool, OSError | None
        self.written: list[bytes] = []
        self.waits: list[float] = []
        self.problems: list[tuple[str, str]] = []
        poll = SimpleNamespace(register=lambda *_: None, poll=self.poll)
        monkeypatch.setattr(console, "select", SimpleNamespace(poll=lambda: poll, POLLOUT=4))
        monkeypatch.setattr(console, "os", SimpleNamespace(write=self.write))
        monkeypatch.setattr(console, "_report", lambda name, reason: self.problems.append((name, reason)))
        self.stream = console._Stream(7, "stdout")

    def poll(self, milliseconds: float) -> bool:
        self.waits.append(milliseconds)
        return self.is_ready

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.error is not None:
            raise self.error
        self.written.append(bytes(data))
        return len(data)


def test_only_the_first_write_waits_and_all_that_was_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that says it can be written to takes 4096 bytes without waiting."""
    descriptor = Descriptor(monkeypatch)
    assert descriptor.stream.write(b"x" * 10_000) == 10_000
    assert [len(part) for part in descriptor.written] == [4096, 4096, 1808]
    assert descriptor.waits == [5000.0] * 3 and not descriptor.problems
    descriptor.is_ready = False
    descriptor.waits.clear()
    for size in (5, 7):
        assert descriptor.stream.write(b"x" * size) == size
    assert descriptor.waits == [5000.0, 0] and descriptor.problems == [("stdout", "its reader does not read")] * 2
    descriptor.is_ready = True
    descriptor.written.clear()
    descriptor.stream.write(b"now")
    assert descriptor.written == [b"[12 bytes could not be written here]\n", b"now"]


@pytest.mark.parametrize("is_run", [True, False])
def test_a_reader_that_leaves_is_a_problem_of_a_run_alone(monkeypatch: pytest.MonkeyPatch, is_run: bool) -> None:
    descriptor = Descriptor(monkeypatch)
    monkeypatch.setattr(console, "_is_run", is_run)
    descriptor.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    descriptor.stream.write(b"help")
    assert descriptor.problems == [("stdout", "Broken pipe")] * is_run
    descriptor.error = OSError(errno.ENOSPC, "No space")
    descriptor.stream.write(b"help")
    assert descriptor.problems[-1] == ("stdout", "No space")


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
