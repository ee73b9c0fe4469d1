"""Text from elsewhere on a terminal: what would steer the terminal is shown instead."""

import re

# Of the control characters a newline and a tab are harmless; escape sequences begin with \x1b or, in one character,
# with \x9b. The others overwrite, ring or change the direction in which text is read. Surrogates stand for bytes of a
# file name that are no UTF-8, and cannot be printed at all.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters as escapes (\\x1b, \\r), so that printing it moves, colours and hides
    nothing."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)
