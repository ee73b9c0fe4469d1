"""Compiled kernels: the second process waits for the first one's, and what was not compiled is waited for no longer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from triton import knobs

from model.kernels.triton import cache
from model.kernels.triton.cache import OneCompiler, share_on_this_node

ROOT = Path(__file__).resolve().parents[4]
GROUP = "kernel.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compile_with(manager: OneCompiler) -> None:
    manager.put_group(GROUP, {GROUP: manager.put("{}", GROUP, binary=False)})


def asking(found: list[dict[str, str] | None]) -> threading.Thread:
    """Another process of the node, for the lock: its own manager, and so its own open file."""
    thread = threading.Thread(target=lambda: found.append(OneCompiler("key").get_group(GROUP)), daemon=True)
    thread.start()
    return thread


def test_a_kernel_that_is_being_compiled_is_waited_for(folder: Path) -> None:
    first, found = OneCompiler("key"), []  # type: OneCompiler, list[dict[str, str] | None]
    assert first.get_group(GROUP) is None, "it must compile"
    assert OneCompiler("other").get_group(GROUP) is None, "another kernel is not waited for"
    thread = asking(found)
    time.sleep(0.2)
    assert thread.is_alive() and not found
    compile_with(first)
    thread.join(timeout=30)
    assert found == [{GROUP: str(folder / "key" / GROUP)}]
    assert OneCompiler("key").get_group(GROUP) == found[0], "nothing to wait for any more"


def test_who_fails_to_compile_holds_nothing(folder: Path) -> None:
    first, found = OneCompiler("key"), []  # type: OneCompiler | None, list[dict[str, str] | None]
    assert first is not None and first.get_group(GROUP) is None
    thread = asking(found)
    time.sleep(0.1)
    assert thread.is_alive()
    first = None
    gc.collect()
    thread.join(timeout=30)
    assert found == [None], "now it is the other one that compiles"


def test_the_wait_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.1)
    first, second = OneCompiler("key"), OneCompiler("key")
    assert first.get_group(GROUP) is None and second.get_group(GROUP) is None
    compile_with(second)  # without the lock
    compile_with(first)
    monkeypatch.setattr(cache.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError("no locks available")))
    assert OneCompiler("third").get_group(GROUP) is None


@pytest.fixture
def home_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "filesystem_type", lambda path: "nfs4")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setitem(knobs.cache.__dict__, "manager_class", None)
    return monkeypatch


def test_a_home_folder_on_a_network_is_left(home_on_nfs: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share_on_this_node(speaks=True)
    folder = tmp_path / f"switchall-triton-{os.getuid()}"
    assert Path(knobs.cache.dir) == folder and folder.stat().st_mode & 0o777 == 0o700
    assert knobs.cache.manager_class is OneCompiler


def test_what_the_user_set_stays(home_on_nfs: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home_on_nfs.setenv("TRITON_CACHE_DIR", "/somewhere")
    share_on_this_node(speaks=True)
    assert knobs.cache.dir == "/somewhere" and not list(tmp_path.iterdir())


def test_a_local_home_folder_stays(home_on_nfs: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home_on_nfs.setattr(cache, "filesystem_type", lambda path: "ext4")
    share_on_this_node(speaks=True)
    assert "TRITON_CACHE_DIR" not in os.environ and not list(tmp_path.iterdir())


@pytest.mark.parametrize("planted", ["writable", "link", "file"])
def test_code_of_others_is_not_run(
    home_on_nfs: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], planted: str
) -> None:
    """Anybody may make a folder of this name in /tmp before we do."""
    folder, elsewhere = tmp_path / f"switchall-triton-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if planted == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    if planted == "file":  # of another user
        folder.chmod(0o700)
        other = os.getuid() + 1
        home_on_nfs.setattr(cache.os, "getuid", lambda: other)
        folder.rename(tmp_path / f"switchall-triton-{other}")
    share_on_this_node(speaks=True)
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "is not this user's alone, so compiled kernels go to" in capsys.readouterr().err


def test_a_disk_that_runs_no_programs_is_left_alone(
    home_on_nfs: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """/tmp with noexec, as hardened nodes mount it: a launcher of triton's there ends in "failed to map segment from
    shared object"."""
    fields = list(os.statvfs(tmp_path))
    fields[8] |= os.ST_NOEXEC  # f_flag
    home_on_nfs.setattr(cache.os, "statvfs", lambda path: os.statvfs_result(fields))
    share_on_this_node(speaks=True)
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "whose programs may not be run (noexec), so compiled kernels go to" in capsys.readouterr().err


PROCESS = """
import sys, triton, triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.kernels.triton.cache import share_on_this_node

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < n) * 2, at < n)

share_on_this_node(speaks=False)
hits = []
knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
print("ready", flush=True)
sys.stdin.readline()
source = ASTSource(fn=kernel, signature={"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={(2,): 128})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(hits)
"""


@pytest.mark.slow
def test_two_processes_compile_a_kernel_once(folder: Path, tmp_path: Path) -> None:
    """With triton's own compiler, ahead of time for sm_90, both at once."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    env.pop("TRITON_INTERPRET")
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = sorted(process.communicate(timeout=300)[0].strip() for process in processes)
    assert printed == ["[False]", "[True]"]
