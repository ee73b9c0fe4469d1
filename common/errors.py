"""Errors that the user must fix: shown as one message, without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable


class UserError(ValueError):
    """Says what is wrong, where (key, file, rank) and which value or command would work."""


class ConfigError(UserError):
    """The configuration is refused; the message starts with the dotted key."""


class DataError(UserError):
    """Data, or the configuration that prepares them, are refused; the message names the file or key and the fix."""


class UnreadableError(DataError):
    """A file could not be read. `number`: its errno; None: another fault of the network, which may pass."""

    def __init__(self, message: str, file: str = "", number: int | None = None) -> None:
        super().__init__(message)
        self.file, self.number = file, number


class PassingError(DataError):
    """The user did nothing wrong: the same command may succeed later, and it continues where it was."""


PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EREMOTEIO", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ETIME", "ENOLINK", "ECOMM"),
        *("ENOTCONN", "ESHUTDOWN", "EPIPE", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
)
"""Errors of a file system or network that another attempt may not meet."""
SCARCE = frozenset({errno.ENOMEM, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
"""What a node lacks while others use it too: memory, locks, open files. A preparation is started again for it; in a run
it is rather a fault of its own, which would come again."""


def kind_of(error: BaseException, lasting: type[UserError] = UserError) -> type[UserError]:
    """What a run raises where it met this error of a file: a PassingError where another attempt may not meet it, else
    `lasting`."""
    # Of a connection some have no number: what urllib, fsspec and multiprocessing raise themselves.
    may_pass = isinstance(error, PassingError | ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno in PASSING
    )
    return PassingError if may_pass else lasting


TO_UTF8 = "convert it from its encoding, for example: iconv -f ISO-8859-1 -t UTF-8"
"""What helps where a text is in another encoding, for a message."""


Problem = Callable[[UserError], None]
"""Takes what is wrong: `refuse` raises it, a list's `append` keeps it, so that a check can go on and find the rest."""


def refuse(error: UserError) -> None:
    """The Problem of a program that ends at the first one."""
    raise error
