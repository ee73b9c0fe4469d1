"""A place to meet for processes of this machine."""

from __future__ import annotations

import socket


def reserved_port() -> socket.socket:
    """Holds a port, of every address of this machine, until it is closed: the system gives it to no other process that
    asks for any free one. One that allows an address to be used again, as the store by which ranks meet, can listen at
    it meanwhile."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def free_port() -> int:
    """Of every address of this machine; nothing keeps another process from taking it before it is used."""
    with reserved_port() as held:
        return int(held.getsockname()[1])
