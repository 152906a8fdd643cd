"""Files that are whole or absent, whenever the process dies and whatever else lies in the folder."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_atomic", "write_atomic"]

_PREFIX, _SUFFIX = ".pyflowkern-", ".tmp"
#: Stands in the names of this machine's files: on some file systems locks do not reach other machines.
_HOST = f"{zlib.crc32(os.uname().nodename.encode()):08x}"
#: Seconds after which a file of another machine that nobody has written to is abandoned.
_DAY = 86_400


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to ``path``, so that a reader finds the old file or the new one and never a part.

    It is :func:`open_atomic` for what is in memory already, with the same errors.

    Example:
        >>> write_atomic(Path("scores.txt"), b"1.5")
        >>> Path("scores.txt").read_text()
        '1.5'
    """
    with open_atomic(path) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Give the block a file to write in parts, which stands at ``path`` once the block has ended well, and not before.

    The data goes to a temporary file beside ``path``, is flushed to the disk and then renamed.  The temporary name
    is random and is opened only if nothing has it, so that a link which someone else put there is never followed.
    A block that raises leaves nothing.  A process that is killed while it writes leaves its temporary file; the next
    write of this machine into the folder removes it, that of another one a day later, as locks may not reach it.

    Raises:
        OSError: naming ``path``, for a full disk, a folder without permission and the like; those of the block that
            name another file stay as they are.

    Example:
        >>> with open_atomic(Path("scores.txt")) as file:
        ...     for score in ("1.5", "2.5"):
        ...         _ = file.write(score.encode())
        >>> Path("scores.txt").read_text()
        '1.52.5'
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with _temporary(path) as file:
            yield file
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if not _is_about(error, path):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """Give the block a temporary file beside ``path``, which takes its name at the end or goes."""
    temporary, handle = _open_temporary(path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while the file is still locked
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is one of writing to ``path``: of its temporary file, a folder above it, or an open file."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return path.is_relative_to(named) or named.name.startswith(_PREFIX)


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """Create a file under a random name and lock it; the lock says that its writer is alive."""
    while True:
        temporary = folder / f"{_PREFIX}{_HOST}{secrets.token_hex(4)}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o666)
        with suppress(OSError):  # a file system without locks: nothing is removed there either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(temporary)):
                return temporary, handle
        os.close(handle)  # another process took it for abandoned before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writers are dead: nobody holds their locks, and on other machines writes to them."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # removed by another process, or not ours to open
            if not path.name.startswith(_PREFIX + _HOST) and _is_recent(path):
                continue
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(handle)


def _is_recent(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime < _DAY
