"""Writing that survives a crash, and disk errors in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compile_sparse.compiler.errors import EnvironmentFailure

__all__ = ["as_disk_failure", "disk_errors", "sync_folder", "sync_tree", "write_durably"]

_DISK = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the device reports an input/output error",
}


def as_disk_failure(error: OSError, where: Path) -> EnvironmentFailure | None:
    """CS5003 when ``error`` is the disk's fault, else None."""
    if error.errno not in _DISK:
        return None
    return EnvironmentFailure(
        "CS5003",
        "The disk cannot be written.",
        where=str(error.filename or where),
        why=f"{_DISK[error.errno].capitalize()}.",
        hint="Free space or choose another folder; the same command resumes.",
    )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn disk errors inside the block into ``EnvironmentFailure``; other ``OSError`` pass."""
    try:
        yield
    except OSError as error:
        failure = as_disk_failure(error, where)
        if failure is None:
            raise
        raise failure from error


def write_durably(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Replace ``path`` atomically: readers and crashes see the old bytes or the new ones.

    A crash may leave ``temporary`` (on the same file system; by default a hidden name beside ``path``).
    """
    temporary = temporary or path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and name below ``folder`` durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))
