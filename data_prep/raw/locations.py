"""Where raw files lie: paths, globs, URLs that fsspec opens, and the output of commands (`pipe:zcat a.tar.gz`).

A URL may carry secrets: a signature in its query, a password before its host. Both are left out of everything that is
printed or written.
"""

import contextlib
import glob
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, Any

from common import presence
from common.errors import SCARCE, DataError, PassingError, kind_of
from common.hashing import sha256_stream
from common.urls import PIPE, URL, WEB, without_secrets

# Parts of a query that a signed URL gets anew each time: they do not say which file it is.
_SIGNATURE = re.compile(
    r"(?i)x-(amz|goog|oss|cos)-.*|signature|expires|policy|key-pair-id|(aws|google|oss)accesskey(id)?|googleaccessid"
    r"|sig|s[vrepst]|sip|spr|srt|sk(oid|tid|t|e|s|v)"  # Azure
    r"|.*token|api_?key|auth(orization)?"
)
_FILE_ENDINGS = (".tar", ".tgz", ".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".json", ".jsonl", ".txt", ".raw")
_PASSING_STATUS = (408, 425, 429)
CONNECT_SECONDS, SILENCE_SECONDS = 30, 300


class UnreachableError(PassingError):
    """A file behind a URL that could not be read now; another attempt may succeed."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with the few names of a Path that reading needs."""

    url: str = field(repr=False)

    @property
    def name(self) -> str:
        """File name without its folder."""
        return PurePosixPath(str(self)).name

    @property
    def suffix(self) -> str:
        """The last dot of the name and what follows."""
        return PurePosixPath(self.name).suffix

    @property
    def is_http(self) -> bool:
        """Whether it is on a web server: then `?` begins a query, there are no folders, and a file is read from front
        to back."""
        return self.url.lower().startswith(WEB)

    @property
    def identity(self) -> str:
        """Which file it is: the URL without the parts that a new signature changes."""
        address, _, query = self.url.partition("?")
        kept = [part for part in query.split("&") if part and not _SIGNATURE.fullmatch(part.partition("=")[0])]
        return without_secrets(address) + ("?" + "&".join(kept) if kept else "")

    def open(self, mode: str, *, random_access: bool = False) -> IO[bytes]:
        """Opens for reading, in mode rb; `random_access`: so that it can be read from any place."""
        filesystem, path = _filesystem(self.url)
        # A stream: ranges need a server that knows them and a size. No packing on the way: the bytes are hashed. But a
        # packed file, which some servers call packed on the way, stays what it is.
        unpacks = not self.name.lower().endswith((".gz", ".tgz", ".zst"))
        plain = {"block_size": 0, "headers": {"Accept-Encoding": "identity"}, "auto_decompress": unpacks}
        stream: IO[bytes] = filesystem.open(path, mode, **(plain if self.is_http and not random_access else {}))
        return stream

    def resolve(self) -> "RemoteFile":
        """Itself: a URL is absolute."""
        return self

    def __str__(self) -> str:
        return without_secrets(self.url.partition("?")[0])


@dataclass(frozen=True)
class PipeFile:
    """What a command writes to its standard output: `pipe:COMMAND`, as webdataset runs it."""

    url: str = field(repr=False)

    @property
    def name(self) -> str:
        """The last word of the command that is the name of a file; else a number for the command."""
        try:
            words = shlex.split(self.url.removeprefix(PIPE))
        except ValueError:
            words = self.url.split()
        names = [PurePosixPath(word.partition("?")[0]).name for word in reversed(words)]
        known = next((name for name in names if name.lower().endswith(_FILE_ENDINGS)), None)
        return known or f"command-{hashlib.sha256(self.identity.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"

    @property
    def suffix(self) -> str:
        """None: the output of a command need not be packed like the file that it reads."""
        return ""

    @property
    def identity(self) -> str:
        """Which command it is."""
        return self.url

    def open(self, mode: str) -> IO[bytes]:
        """Starts the command."""
        from webdataset.gopen import gopen  # here: 3 s, as it imports torch

        stream: IO[bytes] = gopen(self.url, mode)
        return stream

    def resolve(self) -> "PipeFile":
        return self

    def __str__(self) -> str:
        return f"{PIPE}...{self.name}"


InputFile = Path | RemoteFile | PipeFile


def identity(file: InputFile) -> str:
    """What tells a file from all others, for hashes. It is never written, because it may hold secrets."""
    return str(file.resolve()) if isinstance(file, Path) else file.identity


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # here: 40 ms that local runs do not need

    try:
        options = _of_web_servers(fsspec.config.conf) if url.lower().startswith(WEB) else {}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        fix = '; install them with pip install -e ".[http]"' if "aiohttp" in str(error) else ""
        raise DataError(f"cannot open {without_secrets(url)}: {without_secrets(str(error))}{fix}") from None
    except ValueError as error:
        raise DataError(f"cannot open {without_secrets(url)}: {without_secrets(str(error))}") from None
    return filesystem, path


def _of_web_servers(config: dict[str, Any]) -> dict[str, Any]:
    """The user's configuration of fsspec, with a limit of each wait and none of the whole: by default a file may take 5
    minutes, which go on while what was read is encoded."""
    import aiohttp

    limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    given = {**config.get("http", {}), **config.get("https", {})}
    return {"client_kwargs": {"timeout": limit, **given.get("client_kwargs", {})}}


def read_error(file: InputFile, error: Exception) -> DataError:
    """One sentence for a file that could not be opened or read: UnreachableError if another attempt may help."""
    if isinstance(file, PipeFile):
        # No further attempt of ours: a command that fails has said on stderr why, and most fail again.
        return PassingError(f"the command of {file} failed ({_pipe_reason(error)}); its own message is above")
    status = _status(error)
    if status is not None:
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "no standard answer"
        hint = "; a signed URL may have expired" if status in (401, 403) else ""
        lasting = 400 <= status < 500 and status not in _PASSING_STATUS
        kind = DataError if lasting else UnreachableError
        return kind(f"cannot read {file}: the server answers {status} ({phrase}){hint}")
    by_http = isinstance(file, RemoteFile) and file.is_http  # every failure to connect is a FileNotFoundError there
    if isinstance(error, FileNotFoundError | PermissionError) and not by_http:
        missing = "there is no such file" if isinstance(error, FileNotFoundError) else _first_words(error)
        return DataError(f"cannot read {file}: {error.strerror or missing}")
    if isinstance(error, OSError) and isinstance(file, Path):
        kind = PassingError if kind_of(error) is PassingError or error.errno in SCARCE else DataError
        return kind(f"cannot read {file}: {error.strerror or _first_words(error)}")
    cause = error.__cause__ if by_http and error.__cause__ else error
    return UnreachableError(f"cannot read {file}: {type(cause).__name__}: {_first_words(cause)}")


@contextlib.contextmanager
def read_errors(file: InputFile) -> Iterator[None]:
    """Errors of opening and reading a file become one sentence, by `read_error`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        if isinstance(file, Path) and not isinstance(error, OSError):
            raise
        raise read_error(file, error) from None


def _first_words(error: BaseException) -> str:
    return without_secrets(" ".join(str(error).split()))[:300] or "no reason given"


def _pipe_reason(error: Exception) -> str:
    found = re.search(r"exit (-?\d+)", str(error))
    return f"exit code {found[1]}" if found else type(error).__name__


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what caused it, carries."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def expand(pattern: str) -> list[str]:
    """Expands {a,b} and {00..09} in a pattern, as a shell and webdataset do."""
    if "{" not in pattern or os.path.exists(pattern):  # pathlib's raises for a long name, as commands and lists are
        return [pattern]
    import braceexpand  # here: training reads shards, and needs none of what the preparation brings

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{without_secrets(pattern)!r}: {error}; write braces as {{00..09}} or {{a,b}}") from None


def match(root: Path, pattern: str) -> list[InputFile]:
    """What a path, glob, URL or pipe finds below a root, sorted; folders included. A name that exists is meant
    literally, even with [brackets]; `~` at its beginning is the home folder."""
    if pattern.startswith(PIPE):
        return [PipeFile(pattern)]
    if URL.match(pattern):
        return _match_url(RemoteFile(pattern))
    whole = root / pattern
    if whole.exists():
        return [whole]
    pattern = os.path.expanduser(pattern)
    if (root / pattern).exists():
        return [root / pattern]
    pattern = _with_literal_folders(pattern, lambda folder: (root / folder).is_dir())
    return [root / name for name in sorted(glob.glob(pattern, root_dir=root, recursive=True))]


def _with_literal_folders(pattern: str, is_folder: Callable[[str], bool]) -> str:
    """The glob in which leading folders that exist are meant literally: `a dir [work]/*.gz`."""
    parts = pattern.split("/")
    known = 0
    while known < len(parts) - 1 and is_folder("/".join([*parts[: known + 1], ""])):
        known += 1
    return "/".join([*map(glob.escape, parts[:known]), *parts[known:]])


def _match_url(file: RemoteFile) -> list[InputFile]:
    filesystem, path = _filesystem(file.url)
    is_glob = "*" in file.url.partition("?")[0]
    if file.is_http and is_glob and "?" in file.url:
        raise DataError(f"{file} has a `*` and a query, which no server lists; name each URL")
    with read_errors(file):
        if file.is_http and not is_glob:
            filesystem.info(path)
            return [file]
        if not file.is_http and _info(filesystem, path) is not None:
            found = [path]
        else:
            if glob.has_magic(path.rpartition("/")[0]):
                path = _with_literal_folders(path, filesystem.isdir)
            found = sorted(filesystem.glob(path)) if glob.has_magic(path) else []
    return [RemoteFile(str(filesystem.unstrip_protocol(name))) for name in found]


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What a store says of a path; None if nothing is there, which its `exists` and `isfile` say of a lost connection
    too."""
    try:
        found: dict[str, Any] = filesystem.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def is_file(file: InputFile) -> bool:
    """Whether something that `match` found is a file."""
    if isinstance(file, Path):
        return presence.is_file(file)
    if isinstance(file, PipeFile) or file.is_http:
        return True
    with read_errors(file):
        found = _info(*_filesystem(file.url))
    return found is not None and found["type"] == "file"


def size_and_stamp(file: InputFile) -> tuple[int | None, str]:
    """Bytes as stored, or None where that is not known before it is read; and what changes when the file does:
    modification time, or the store's own tag (etag, checksum) of a URL. Raises DataError if there is no such file."""
    if isinstance(file, PipeFile):
        return None, ""
    with read_errors(file):
        if isinstance(file, Path):
            status = file.stat()
            return status.st_size, str(status.st_mtime_ns)
        filesystem, path = _filesystem(file.url)
        info = filesystem.info(path)
        size = None if info.get("size") is None else int(info["size"])
        if file.is_http:
            return size, str(info.get("ETag") or info.get("Last-Modified") or "")
        return size, str(filesystem.ukey(path))


def sha256_of(file: InputFile, *, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file as stored. Calls `on_bytes` with the size of each block read. Raises DataError."""
    with read_errors(file), file.open("rb") as stream:
        return sha256_stream(stream, on_bytes)
