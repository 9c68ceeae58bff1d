"""The file a probe leaves: JSON, complete or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.durable import disk_errors, write_durably

__all__ = ["refuse_occupied", "write_table"]


def refuse_occupied(path: Path, *, force: bool) -> None:
    """Refuse before minutes of measuring what could not be written after them.

    Raises:
        UsageError: CS1045 when the file exists and may not be replaced, or its folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        what, why, hint = "cannot be written", "Its folder does not exist.", "Create the folder, or choose another."
    elif path.is_dir():
        what, why, hint = "cannot be written", "It is a folder.", "Name a file."
    elif path.exists() and not force:
        what, why, hint = "exists", "It may hold a table of another GPU.", "Choose another name, or add --force."
    else:
        return
    raise UsageError("CS1045", f"{path.name} {what}.", where=f"--out {path}", why=why, hint=hint)


def write_table(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result`` to ``path`` by one rename.

    Raises:
        EnvironmentFailure: CS5003 when the disk cannot be written.
    """
    data = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(path.absolute().parent):
        write_durably(path.absolute(), data.encode())
