"""Digests of every file in a folder, and the check that a folder is exactly what was recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

__all__ = ["digest_file", "folder_digests", "folder_problem", "list_files"]

Digests = dict[str, tuple[str, int]]


def digest_file(path: Path) -> tuple[str, int]:
    """``(sha256 hex, bytes)`` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all regular files, sorted.

    Raises:
        ValueError: something that is neither a folder nor a regular file, such as a symbolic link: what it stands for can
            change after it was checked.
    """
    found: list[str] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    found.append(name)
                else:
                    raise ValueError(f"{name} is a symbolic link or a special file")
    return sorted(found)


def folder_digests(folder: Path, *, known: Mapping[str, str] | None = None, without: Collection[str] = ()) -> Digests:
    """Digest and size of every file; ``known`` digests (computed while this process wrote the file) are not repeated."""
    known = known or {}
    result: Digests = {}
    for name in list_files(folder):
        if name in without:
            continue
        path = folder / name
        result[name] = (known[name], path.stat().st_size) if name in known else digest_file(path)
    return result


def folder_problem(
    folder: Path, recorded: Mapping[str, tuple[str, int]], *, contents: bool = True, without: Collection[str] = ()
) -> str | None:
    """Why ``folder`` is not exactly ``recorded``, as a sentence; None when it is.

    A file that is not recorded counts as a difference: runtimes pick up files by name.
    """
    try:
        present = set(list_files(folder)) - set(without)
    except ValueError as error:
        return f"{error}."
    if missing := sorted(set(recorded) - present):
        return f"{missing[0]} is missing."
    if extra := sorted(present - set(recorded)):
        return f"{extra[0]} is not listed in the manifest."
    for name, (digest, size) in sorted(recorded.items()):
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, recorded are {size:,}."
        if contents and digest_file(path)[0] != digest:
            return f"{name} does not have the recorded sha256."
    return None
