"""What the command line prints: errors on stderr, results on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from compile_sparse.compiler.errors import CompileSparseError, GateFailure

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["print_json", "print_table", "render_error"]


def render_error(error: CompileSparseError, *, as_json: bool) -> None:
    """Say what, where, why and what to do on stderr; with ``as_json`` also ``{"error": {...}}`` on stdout.

    A failed gate prints no JSON of its own: the report is on stdout already and says so.
    """
    if as_json and not isinstance(error, GateFailure):
        print_json({"error": error.as_dict()})
    click.echo(f"error {error}", err=True)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(tables: Sequence[RenderableType]) -> None:
    """Tables on stdout; plain text, 120 columns wide, when stdout is not a terminal."""
    import sys

    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in tables:
        console.print(table)
