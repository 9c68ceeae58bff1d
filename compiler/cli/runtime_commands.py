"""``compile-sparse runtime``: runtimes in their own interpreters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from compile_sparse.compiler.cli.options import debug_option, json_option
from compile_sparse.compiler.cli.rendering import print_json, print_table
from compile_sparse.compiler.cli.terminal_progress import TerminalProgress

if TYPE_CHECKING:
    from compile_sparse.compiler.runtimes.environments import RuntimeStatus

__all__ = ["runtime_command"]


@click.group("runtime", invoke_without_command=True)
@json_option
@debug_option
@click.pass_context
def runtime_command(ctx: click.Context, as_json: bool) -> None:
    """List, install or add runtimes that need an interpreter of their own."""
    if ctx.invoked_subcommand is None:
        _list(None, as_json=as_json)


@runtime_command.command("install")
@click.argument("name")
@click.option("--version", metavar="V", help="Version of the runtime.  [default: the one known to work]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="What it runs on.  [default: what this machine has]")
@click.option("--force", is_flag=True, help="Start over, in place of what is registered.")
@json_option
@debug_option
def install_command(name: str, as_json: bool, **options: Any) -> None:
    """Build a virtual environment for runtime NAME (gigabytes, minutes) and register it.

    Packages come from where pip's own configuration says. An interrupted installation goes on where it stopped.
    """
    from compile_sparse.compiler.runtimes.environments import RuntimeStatus
    from compile_sparse.compiler.runtimes.install import install_runtime

    with TerminalProgress() as progress:
        record = install_runtime(name, progress=progress, **options)
    _show([RuntimeStatus(name, record)], as_json=as_json)


@runtime_command.command("add")
@click.argument("name")
@click.option("--python", metavar="PATH", required=True, help="The interpreter of an environment that has the runtime.")
@json_option
@debug_option
def add_command(name: str, python: str, as_json: bool) -> None:
    """Register an environment of yours for runtime NAME, or check the registered one again.

    The interpreter is started to find out what it has, and later to serve models: name only one that you trust.
    """
    from compile_sparse.compiler.runtimes.environments import RuntimeStatus
    from compile_sparse.compiler.runtimes.install import add_runtime

    with TerminalProgress() as progress:
        record = add_runtime(name, python, progress)
    _show([RuntimeStatus(name, record)], as_json=as_json)


@runtime_command.command("list")
@click.argument("name", required=False)
@json_option
@debug_option
def list_command(name: str | None, as_json: bool) -> None:
    """Show where each runtime is, or how to install it; with NAME only that one."""
    _list(name, as_json=as_json)


def _list(name: str | None, *, as_json: bool) -> None:
    from compile_sparse.compiler.runtimes.environments import find_kind, list_runtimes

    if name is not None:
        find_kind(name)
    _show([status for status in list_runtimes() if name in (None, status.name)], as_json=as_json)


def _show(statuses: list[RuntimeStatus], *, as_json: bool) -> None:
    found = [status.as_dict() for status in statuses]
    if as_json:
        print_json(found)
        return
    from compile_sparse.compiler.cli.tables import runtimes_table

    print_table([runtimes_table(found)])
