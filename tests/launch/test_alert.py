"""launch/alert.py and launch/webhook.py: a test of a run's alerts, and a sentence for a chat."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import webhook
from pretrain.cli.alert import main

ROOT = Path(__file__).resolve().parents[2]


class Chat(http.server.ThreadingHTTPServer):
    """A server that keeps what is posted, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[str, str | None, Any]] = []
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/secret"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, self.headers["Content-Type"], json.loads(body)))
        self.answer(self.server.status)

    def do_GET(self) -> None:
        self.answer(200)

    def answer(self, status: int) -> None:
        self.send_response(status)
        if status in (301, 302, 303, 307):
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

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
    assert main([given, "--event", "failed"]) == 2
    assert "--event: goes with --text" in capsys.readouterr().err


def test_a_command_that_hangs_is_said_to_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = str(config(tmp_path, alert_command="sh -c 'sleep 600'"))
    assert main([given, "--seconds", "1"]) == 2
    assert "monitor.alert_command: sh did not end within 1 s and was killed" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_too(tmp_path: Path) -> None:
    """Which has a session of its own, so that the terminal does not reach it."""
    script = str(ROOT / "launch" / "alert.py")
    number = tmp_path / "number"
    program = 'cat; echo $$ >"$0.new"; mv "$0.new" "$0"; sleep 600'
    given = config(tmp_path, alert_command=shlex.join(["sh", "-c", program, str(number)]))
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen([sys.executable, script, str(given)], stdout=subprocess.DEVNULL, stderr=stream)
    while not number.exists() and process.poll() is None:
        time.sleep(0.05)
    group = int(number.read_text())
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(300) == 130 and errors.read_text() == "interrupted\n"
        assert ends(group)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def ends(group: int) -> bool:
    """Whether all processes of the group end; waits for what was killed to go."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_webhook_takes_the_key_of_another_chat_and_needs_no_package(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "hook").write_text(chat.address)
    script = str(ROOT / "launch" / "webhook.py")
    arguments = [script, "--url-file", "~/hook", "--key", "content", "-- naïve σ\n"]
    environment = {"HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    # -I and -S: neither the environment's packages nor PYTHONPATH.
    done = subprocess.run([sys.executable, "-I", "-S", *arguments], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [content for _, _, content in chat.posts] == [{"content": "-- naïve σ\n"}]


@pytest.mark.parametrize("status", [301, 302, 303, 307])
def test_a_server_that_sends_elsewhere_has_not_taken_the_text(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """As from http to https: urllib would ask there without the text, and hear 200."""
    (tmp_path / "hook").write_text(chat.address)
    chat.status = status
    assert webhook.main(["--url-file", str(tmp_path / "hook"), "text"]) == 1
    assert capsys.readouterr().err.endswith(f"did not take it: HTTP status {status}\n")


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
