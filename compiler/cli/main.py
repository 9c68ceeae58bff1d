"""Entry point of the ``compile-sparse`` command. The one place that turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from compile_sparse.compiler.cli.commands import cli
from compile_sparse.compiler.cli.rendering import render_error
from compile_sparse.compiler.errors import CompileSparseError, Interrupted, UsageError

__all__ = ["main", "run"]


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing escapes but the process being killed."""
    # click's own parsing may have failed before it knew about these two, so they are looked for here.
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        result = cli.main(list(arguments), prog_name="compile-sparse", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        render_error(_usage_error(error), as_json=as_json)
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        stopped = Interrupted("CS6001", "Interrupted.", hint="The same command resumes.")
        render_error(stopped, as_json=as_json)
        return Interrupted.exit_code
    except CompileSparseError as error:
        if debug:
            traceback.print_exc()
        render_error(error, as_json=as_json)
        return error.exit_code
    except BrokenPipeError:
        # The reader of stdout (such as head) is gone; point stdout elsewhere so that the exit does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CompileSparseError.exit_code
    except Exception as error:  # noqa: BLE001 - the process boundary: people get a message, never a raw traceback
        if debug:
            traceback.print_exc()
        render_error(_internal_error(error), as_json=as_json)
        return CompileSparseError.exit_code


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "compile-sparse"
    return UsageError("CS1000", error.format_message(), where=command, hint=f"See '{command} --help'.")


def _internal_error(error: Exception) -> CompileSparseError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return CompileSparseError(
        "CS9001",
        "Internal error.",
        where=f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}",
        why=f"{type(error).__name__}: {error}",
        hint="This is a defect of compile-sparse. Run again with --debug and report the traceback.",
    )


if __name__ == "__main__":
    main()
