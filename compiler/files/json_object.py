"""A JSON object in a small file of someone else's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_object"]

MAX_BYTES = 4 * 1024 * 1024


def read_object(path: Path, *, most: int = MAX_BYTES) -> dict[str, Any]:
    """What the file holds. Callers name the file, and their own codes, in their errors.

    Args:
        path: of the file.
        most: bytes it may have.

    Raises:
        ValueError: it is larger, is not JSON, or holds no object.
        RecursionError: it is nested too deeply.
        OSError: it cannot be read.
    """
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most} bytes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found
