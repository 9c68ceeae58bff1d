"""A command line in this process, and what it prints."""

from __future__ import annotations

import contextlib
import io
import json as json_
from typing import Any, NamedTuple

from compile_sparse.compiler.cli.main import run

__all__ = ["Shell", "shell"]


class Shell(NamedTuple):
    """What a command left behind: exit code, stdout and stderr."""

    code: int
    out: str
    errors: str

    @property
    def data(self) -> dict[str, Any]:
        """What it printed on stdout with ``--json``; empty when nothing."""
        return dict(json_.loads(self.out)) if self.out else {}

    @property
    def error(self) -> dict[str, Any]:
        """The error that it printed there."""
        return dict(self.data["error"])


def shell(*words: object, json: bool = True) -> Shell:
    """Run a command line, with ``--json`` unless a table is wanted."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, words), *(["--json"] if json else [])])
    return Shell(code, out.getvalue(), err.getvalue())
