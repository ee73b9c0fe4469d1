"""A place to meet for processes of this machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Of 127.0.0.1; nothing keeps another process from taking it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
