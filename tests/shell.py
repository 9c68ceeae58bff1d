"""A command line in this process, and the JSON it prints."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any, NamedTuple

from compile_sparse.compiler.cli.main import run

__all__ = ["Shell", "shell"]


class Shell(NamedTuple):
    """What a command left behind: exit code, what it printed on stdout as data (empty when nothing), and stderr."""

    code: int
    data: dict[str, Any]
    errors: str


def shell(*words: object) -> Shell:
    """Run a command line with ``--json``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, words), "--json"])
    return Shell(code, json.loads(out.getvalue()) if out.getvalue() else {}, err.getvalue())
