"""Addresses of files that are not on a disk here: URLs, and commands whose output is read.

A URL may carry secrets: a password before its host, or a signature in its query. Both are left out of everything that
is printed or written.
"""

from __future__ import annotations

import re

URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
PIPE = "pipe:"
"""Stands before a command whose output is read."""
WEB = ("http://", "https://")
# A scheme of 40 letters at most: without a limit a long word takes time by the square of its length.
_SCHEME = r"[a-z][a-z0-9+.-]{0,39}://"
# The password of https://me:p@ss@host/ holds an @: the host begins behind the last one. So may it a ? or # that should
# have been written %3F or %23; without a colon before them they begin the query of https://host?mail=me@x.org.
# An address may lead to another one with a login of its own: zip://a.json::https://me:password@host/b.zip.
_ADDRESS = re.compile(
    rf"(?P<scheme>{_SCHEME})(?P<login>[^\s/?#:'\"<>]*:[^\s/'\"<>]*@|[^\s/?#'\"<>]*@)?"
    rf"(?P<address>(?:(?!{_SCHEME})[^\s?'\"<>])*)(?P<query>\?[^\s'\"<>]*)?",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """The text without the query of every URL and without what precedes its host."""
    return _ADDRESS.sub(lambda found: found["scheme"] + found["address"], text)


def may_hold_secret(text: str) -> bool:
    """Whether a URL in the text has a password before its host or, on the web, a query, which may be a signature."""
    for found in _ADDRESS.finditer(text):
        login, is_web = found["login"] or "", found["scheme"].lower() in WEB
        if ":" in login or (is_web and (login or found["query"])):
            return True
    return False
