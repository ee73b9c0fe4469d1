"""Errors that are the user's to fix: shown as one message, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Says what is wrong, where (key, file, rank) and which value or command would work."""


class ConfigError(UserError):
    """The configuration is refused; the message starts with the dotted key."""


class DataError(ValueError):
    """A problem with data or its configuration that the user can mend: one message with what, which file,
    which fix."""
