"""launch/alert.py and launch/webhook.py: a test of a run's alerts, and a sentence for a chat."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from launch import webhook
from pretrain.cli.alert import main
from pretrain.config.alert_kinds import AlertKind
from tests.pretrain.report.test_alerts import HANGS, has_ended, until

ROOT = Path(__file__).resolve().parents[2]


class Chat(http.server.ThreadingHTTPServer):
    """A server that keeps what is posted, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[str, str | None, Any]] = []
        self.agents: set[str | None] = set()
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/secret"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.agents.add(self.headers["User-Agent"])
        self.server.posts.append((self.path, self.headers["Content-Type"], json.loads(body or "null")))
        self.send_response(self.server.status)
        if 300 <= self.server.status < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Chat() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def config(folder: Path, **monitor: Any) -> Path:
    tree = json.loads((ROOT / "configs" / "switchall_tiny.json").read_text())
    path = folder / "night.json"
    path.write_text(json.dumps({**tree, "monitor": monitor}))
    return path


def test_a_test_of_the_alerts_of_a_run_reaches_the_chat(
    chat: Chat, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hook").write_text(chat.address + "\n")
    command = f"'{sys.executable}' '{ROOT / 'launch' / 'webhook.py'}' --url-file '{tmp_path / 'hook'}'"
    given = str(config(tmp_path, alert_command=command, alerts=["failed", "requeued"]))
    assert main([given]) == 0
    assert main([given, "--event", "requeued", "--text", "job 7: back in the queue"]) == 0
    assert main([given, "--event", "rollback", "--text", "nobody has asked for this"]) == 0
    texts = ["run night: test: a test of its alerts", "run night: requeued: job 7: back in the queue"]
    assert chat.posts == [("/services/secret", "application/json", {"text": text}) for text in texts]
    assert capfd.readouterr() == ("".join(f"sent: {text}\n" for text in texts), "")
    assert chat.agents == {"switchall-alert"}, "some servers refuse urllib's own name"
    chat.status = 404
    assert main([given]) == 2
    said = capfd.readouterr().err
    assert f"error: the server of {tmp_path / 'hook'} did not take it: HTTP status 404\n" in said
    assert "error: monitor.alert_command: " in said and "ended with exit code 1" in said and "secret" not in said


def test_a_script_may_tell_of_a_run_without_a_command_and_a_test_says_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = str(config(tmp_path))
    assert main([given, "--event", "failed", "--text", "why"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([given]) == 2
    assert capsys.readouterr().err == (
        f"error: monitor.alert_command: is not set in {given}; --set monitor.alert_command=... tries one\n"
    )
    assert main([given, "--set", "monitor.alert_command=echo"]) == 0
    assert main([given, "--set", "monitor.alert_command=no-such-program"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: monitor.alert_command: there is no program") and "printed" not in said
    for half in (["--event", "failed"], ["--text", "why"]):
        assert main([given, *half]) == 2
        assert "--event: goes with --text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", get_args(AlertKind))
def test_the_words_of_a_script_are_told_whatever_the_kind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    given = str(config(tmp_path, alert_command="true", alerts=get_args(AlertKind)))
    assert main([given, "--event", kind, "--text", "node 7 burns"]) == 0
    assert capfd.readouterr() == (f"sent: run night: {kind.replace('_', ' ')}: node 7 burns\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_too(tmp_path: Path, number: signal.Signals) -> None:
    given = str(config(tmp_path, alert_command=f"{HANGS} '{tmp_path / 'pid'}'"))
    taken = signal.signal(number, signal.SIG_DFL)  # nohup, and a shell's job in the background, ignore some
    try:
        process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "alert.py"), given], stderr=subprocess.PIPE)
    finally:
        signal.signal(number, taken)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    pid = int((tmp_path / "pid").read_text())
    try:
        assert os.getpgid(pid) != os.getpgid(process.pid), "Ctrl-C on a terminal reaches it"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert said == (b"interrupted\n" if number == signal.SIGINT else b"")
        until(lambda: has_ended(pid))
    finally:
        process.kill()
        if not has_ended(pid):
            os.killpg(pid, signal.SIGKILL)


def test_a_signal_that_its_caller_ignores_ends_no_alert(tmp_path: Path) -> None:
    """The job's script, which tells of its end while SLURM ends it."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    waits = f"touch {begun}; until [ -e {go} ]; do sleep 0.05; done; true"
    given = str(config(tmp_path, alert_command=f"sh -c '{waits}'"))
    taken = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "alert.py"), given], stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGTERM, taken)
    try:
        until(begun.exists)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        go.touch()
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (0, b"sent: run night: test: a test of its alerts\n")


def test_a_command_that_hangs_is_said_to_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = str(config(tmp_path, alert_command="sh -c 'sleep 600'"))
    assert main([given, "--seconds", "1"]) == 2
    assert "monitor.alert_command: sh did not end within 1 s and was killed" in capsys.readouterr().err


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_because_the_other_address_would_get_no_text(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    (tmp_path / "hook").write_text(chat.address)
    chat.status = status
    assert webhook.main(["--url-file", str(tmp_path / "hook"), "text"]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"HTTP status {status}; it names another address, give that one\n") and "secret" not in said
    assert len(chat.posts) == 1


def test_the_webhook_takes_the_key_of_another_chat_and_needs_no_package(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "hook").write_text(chat.address)
    script = str(ROOT / "launch" / "webhook.py")
    arguments = [script, "--url-file", "~/hook", "--key", "content", "-- naïve σ\n"]
    environment = {"HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    # -I and -S: neither the environment's packages nor PYTHONPATH.
    done = subprocess.run([sys.executable, "-I", "-S", *arguments], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [content for _, _, content in chat.posts] == [{"content": "-- naïve σ\n"}]


def test_the_home_of_no_user_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert webhook.main(["--url-file", "~no-such-user/hook", "text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --url-file: ~no-such-user/hook cannot be read (") and said.count("\n") == 1


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff", "cannot be read"),
        (b"", "must hold one address that begins with https:// or http://"),
        (b"file:///etc/secret", "must hold one address"),
        (b"https://host/secret\nhttps://host/secret", "must hold one address"),
        (b"https://host/secret # of the team", "must hold one address"),
    ],
)
def test_a_file_without_an_address_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    path = tmp_path / "hook"
    if content is not None:
        path.write_bytes(content)
    assert webhook.main(["--url-file", str(path), "text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --url-file: {path} ") and words in said
    assert said.count("\n") == 1 and "secret" not in said


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/secret", "http://[secret", "http://127.0.0.1:secret/"])
def test_a_server_that_cannot_be_reached_is_a_sentence_without_the_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "hook").write_text(address)
    assert webhook.main(["--url-file", str(tmp_path / "hook"), "text"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the server of ") and said.count("\n") == 1 and "secret" not in said
