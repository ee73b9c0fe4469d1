"""The environment variables of a launcher: what is refused by name, before torch is asked, and what is waited for."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed import TCPStore

from common.errors import UserError
from common.paths import REPOSITORY
from common.ports import reserved_port
from pretrain import device
from pretrain.cli import train as cli
from pretrain.config.schema import TrainConfig
from pretrain.device import Unreachable, start
from pretrain.gpus import device_type
from pretrain.ranks import Ranks
from pretrain.report.exit_codes import ExitCode
from pretrain.resilience.early_end import EarlyEnd
from pretrain.resilience.signals import ProcessState, Stop, is_launched

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 1 of 2; nothing that a test sets outlives it."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_places(launched: pytest.MonkeyPatch) -> None:
    assert Ranks.from_environment() == Ranks(rank=1, local_rank=1, world_size=2, local_size=2)
    launched.delenv("LOCAL_SIZE")
    launched.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun
    assert Ranks.from_environment() == Ranks(rank=1, local_rank=1, world_size=2, local_size=2)
    for name in NAMES:
        launched.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(rank=0, local_rank=0, world_size=1, local_size=1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: is 'abc' in the environment, not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: is '99999' in the environment, not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: is '0'"),
        ({"MASTER_PORT": "²"}, "MASTER_PORT: is '²'"),
        ({"RANK": "5"}, "RANK: is 5, but WORLD_SIZE is 2, so that ranks go from 0 to 1"),
        (
            {"RANK": "9" * 5000},
            f"RANK: is '{'9' * 60}'... (5,000 characters) in the environment, not a whole number of at least 0",
        ),
        ({"RANK": "-1"}, "RANK: is '-1' in the environment, not a whole number of at least 0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: is 2, but LOCAL_SIZE is 2"),
        ({"LOCAL_SIZE": "9"}, "LOCAL_SIZE: is '9' in the environment, not a whole number from 1 to 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: is '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: is ''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is empty"),
        ({"RANK": None}, "RANK: is not set although WORLD_SIZE is 2; start the ranks through a launcher"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set although WORLD_SIZE is 2"),
        ({"MASTER_PORT": None}, "MASTER_PORT: is not set although WORLD_SIZE is 2"),
        ({"WORLD_SIZE": None}, "LOCAL_SIZE: is '2'"),
        ({"WORLD_SIZE": None, "LOCAL_SIZE": None}, "RANK: is 1, but WORLD_SIZE is 1"),
    ],
)
def test_bad_variables_are_refused_by_name(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], words: str
) -> None:
    for name, value in changes.items():
        launched.delenv(name) if value is None else launched.setenv(name, value)
    is_launched()  # the entry point asks first
    assert cli.main(["--config", "never read"]) == ExitCode.REFUSED
    message = capsys.readouterr().err
    assert message.startswith(f"error: {words}") and message.count("\n") == 1, message


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2)])
def test_what_a_rank_does_before_the_ranks_meet(
    launched: pytest.MonkeyPatch, tmp_path: Path, rank: int, world_size: int
) -> None:
    """The first of them estimates what the run needs, and says what it is. All are patient with the disk, which one of
    several does not ask about every file."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_SIZE", world_size)):
        launched.setenv(name, str(value))
    stop, parts = Stop(), {name: Mock() for name in ("Forecast", "Patience", "preflight", "print_derived", "run")}
    stop.state = ProcessState.LOADING
    checkpoint = Mock()

    def checked(*arguments: Any, **options: Any) -> tuple[str, int, Mock]:
        assert stop.state is ProcessState.JOINING, "a signal ends it now"
        return "the data", 1, checkpoint

    parts["preflight"].side_effect = checked
    parts["run"].return_value = 5
    for name, part in parts.items():
        launched.setattr(cli, name, part)
    config = str(REPOSITORY / "configs" / "switchall_tiny.json")
    assert cli.main(["--config", config, "--run-dir", str(tmp_path / "run")], stop) == 5
    made, is_first = parts["Patience"], rank == 0
    assert made.call_args.args[0] > 0 and made.call_args.kwargs == {"rank": rank}
    expected = {"alone": world_size == 1, "patience": made.return_value}
    assert parts["preflight"].call_args.args[1:] == (world_size, tmp_path / "run")
    assert parts["preflight"].call_args.kwargs == expected
    assert parts["print_derived"].call_count == parts["Forecast"].call_count == is_first
    assert parts["Forecast"].return_value.close.call_count == is_first, "its process ends with this one"
    if is_first:
        assert parts["print_derived"].call_args.args[1:] == (1, "the data", tmp_path / "run", checkpoint)
    _, *others, side_by_side, end = parts["run"].call_args.args
    ranks = Ranks(rank=rank, local_rank=rank, world_size=world_size, local_size=world_size)
    assert others == ["the data", tmp_path / "run", ranks, stop]
    assert (side_by_side is not None) == is_first and end is not None


def test_a_start_that_is_refused_is_ending_before_it_says_so(launched: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The launcher's signal to a rank that still tells why, perhaps by a slow alert, is no stop of the run."""
    for name in ("RANK", "LOCAL_RANK"):
        launched.setenv(name, "0")
    stop, noted = Stop(), []
    launched.setattr(EarlyEnd, "note", lambda end, code, reason: noted.append((code, stop.state)))
    config = str(REPOSITORY / "configs" / "switchall_tiny.json")
    line = ["--config", config, "--run-dir", str(tmp_path / "run"), "--set", "train.stepz=1"]
    assert cli.main(line, stop) == ExitCode.REFUSED
    assert noted == [(ExitCode.REFUSED, ProcessState.ENDING)]


@pytest.mark.parametrize(
    "named, words", [("xyz", "DS_ACCELERATOR: is 'xyz'"), ("", "DS_ACCELERATOR: is ''"), ("xpu", "cuda and on cpu")]
)
def test_other_accelerators_are_refused(launched: pytest.MonkeyPatch, named: str, words: str) -> None:
    launched.setenv("DS_ACCELERATOR", named)
    with pytest.raises(UserError, match=words):
        device_type()


def test_a_name_that_no_server_knows_is_said_and_given_up(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched.setenv("MASTER_ADDR", "node-7.invalid")
    launched.setenv("LOCAL_RANK", "0")
    asked, now = [], [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    launched.setattr(device, "time", clock)

    def unknown(name: str, port: None) -> None:
        asked.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    launched.setattr(device.socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match=r"no name server knows 'node-7\.invalid' .Name or service not known"):
        start(Ranks.from_environment(), TrainConfig(), timeout_seconds=3.0)
    said = capsys.readouterr().err
    assert "rank 1 waits for a name server to know MASTER_ADDR = node-7.invalid" in said and said.count("\n") == 1
    assert asked == ["node-7.invalid"] * 4


def test_what_is_no_name_is_no_traceback(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("MASTER_ADDR", "a" * 64 + ".example")  # a label has at most 63 letters: UnicodeError
    with pytest.raises(Unreachable, match="MASTER_ADDR: no name server knows"):
        start(Ranks.from_environment(), TrainConfig(), timeout_seconds=0.0)


def test_a_rank_says_that_it_waits_and_ends_with_one_sentence(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 of 2, alone: the other one never comes."""
    launched.setenv("RANK", "0")
    launched.setenv("LOCAL_RANK", "0")
    launched.setattr(device, "REMINDER_SECONDS", 0.1)
    cannot = pytest.raises(Unreachable, match=r"the ranks cannot meet at 127\.0\.0\.1:\d+ .*within 2 s")
    with reserved_port() as held, cannot:
        launched.setenv("MASTER_PORT", str(held.getsockname()[1]))
        start(Ranks.from_environment(), TrainConfig(), timeout_seconds=2.0)
    assert "rank 0 waits for the other 1 of 2 ranks at 127.0.0.1:" in capsys.readouterr().err
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_a_run_of_one_process_keeps_its_port_until_its_store_listens(launched: pytest.MonkeyPatch) -> None:
    """Else another one that starts beside it could be given it."""
    for name in NAMES:
        launched.delenv(name, raising=False)

    def meet(*_: Any) -> None:
        port = int(os.environ["MASTER_PORT"])
        for address in ("127.0.0.1", ""):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port))
        store.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))

    store: list[TCPStore] = []
    launched.setattr(device, "_meet", meet)
    start(Ranks.from_environment(), TrainConfig(device="cpu", threads=1))
    assert store[0].port == int(os.environ["MASTER_PORT"])
