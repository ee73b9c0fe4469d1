"""Addresses of files that are not on a disk here: URLs, and commands whose output is read.

A URL may carry secrets: a password before its host, or a signature in its query. What is printed or written anywhere
is the address without both.
"""

from __future__ import annotations

import re

URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
PIPE = "pipe:"
"""Stands before a command whose output is read."""
WEB = ("http://", "https://")
_ADDRESS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<login>[^\s/@'\"<>]*@)?(?P<address>[^\s?'\"<>]*)(?P<query>\?[^\s'\"<>]*)?",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """The text in which every URL has lost its query and what stands before its host."""
    return _ADDRESS.sub(lambda found: found["scheme"] + found["address"], text)


def may_hold_secret(text: str) -> bool:
    """Whether a URL in the text has a password before its host or, on the web, a query, which may be a signature."""
    for found in _ADDRESS.finditer(text):
        login, is_web = found["login"] or "", found["scheme"].lower() in WEB
        if ":" in login or (is_web and (login or found["query"])):
            return True
    return False
