#!/usr/bin/env python
"""Posts a sentence to a webhook of Slack, Mattermost or another chat: python launch/webhook.py --url-file FILE TEXT

A command for monitor.alert_command. The address of a webhook is a password, so it is read from a file and never
printed. Uses the standard library alone, so any Python from 3.11 on will do.
"""

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

SECONDS = 10.0
"""Longest wait for an answer."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/webhook.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--url-file", required=True, metavar="FILE", help="holds the address in one line; ~/ is allowed"
    )
    parser.add_argument(
        "--key", default="text", metavar="KEY", help='of the JSON that is sent (default: text; "content" for Discord)'
    )
    parser.add_argument("text", metavar="TEXT", help="what is sent")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 the server took it, 1 it did not, 2 refused."""
    args = build_parser().parse_args(arguments)
    path = Path(args.url_file)
    try:
        path = path.expanduser()
        address = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: no user has this home
        print(f"error: --url-file: {path} cannot be read ({getattr(error, 'strerror', error)})", file=sys.stderr)
        return 2
    if not address.startswith(("https://", "http://")) or len(address.split()) != 1:
        print(f"error: --url-file: {path} must hold one address that begins with https:// or http://", file=sys.stderr)
        return 2
    failure = post(address, {args.key: args.text})
    if failure is not None:
        print(f"error: the server of {path} did not take it: {failure}", file=sys.stderr)
        return 1
    return 0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib asks again elsewhere without what was posted, so the server there would take nothing and say 200."""

    def redirect_request(self, *_: object) -> None:
        """Follows none: the redirect is an HTTPError."""


def post(address: str, content: dict[str, str]) -> str | None:
    """Why the server did not take it, without the address; None: it did."""
    # Some servers refuse urllib's own name.
    headers = {"Content-Type": "application/json", "User-Agent": "switchall-alert"}
    try:
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS):
            return None
    except urllib.error.HTTPError as error:
        moved = "; it names another address, give that one" if 300 <= error.code < 400 else ""
        return f"HTTP status {error.code}{moved}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:  # the text of the last two may have the address
        return getattr(error, "strerror", None) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
