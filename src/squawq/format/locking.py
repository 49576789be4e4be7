"""One process at a time works on a folder: a lock on the folder itself, which leaves no file behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squawq.errors import OutputError

if sys.platform != "win32":  # where nothing is locked
    import fcntl


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock on `folder`, which is made if it is not there, until the context ends.

    The lock stays with the folder when that is renamed, and goes with the process, however it ends. It holds among the
    processes of one machine.

    Args:
        wait: Wait for a process that holds the lock, instead of raising.

    Raises:
        OutputError: Another process is at work on the folder, or it cannot be made or locked.
    """
    try:
        handle = _locked_handle(folder, wait)
    except BlockingIOError as error:
        raise OutputError(f"another process is at work on {folder}; wait until it ends, or stop it") from error
    except OSError as error:
        raise OutputError(f"{folder} cannot be made or locked: {error.strerror}") from error
    try:
        yield
    finally:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)  # said, since a forked child may hold the handle, too
            os.close(handle)


def _locked_handle(folder: Path, wait: bool) -> int | None:
    """A locked handle of the folder that has this path now: while we wait, another may remove or rename it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
