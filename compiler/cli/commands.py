"""The commands. Each parses, calls one function of the public API and prints; nothing is decided here.

Heavy modules are imported inside the commands: ``compile-sparse --help`` must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compile_sparse import __version__
from compile_sparse.compiler.cli.backend_flags import CompilingCommand, VerifyingCommand
from compile_sparse.compiler.cli.default_group import DefaultGroup, hidden_alias
from compile_sparse.compiler.cli.microbench_command import microbench_command
from compile_sparse.compiler.cli.options import debug_option, json_option, measurement_options, recipe_options
from compile_sparse.compiler.cli.rendering import print_json, print_table
from compile_sparse.compiler.cli.runtime_commands import runtime_command
from compile_sparse.compiler.cli.terminal_progress import TerminalProgress
from compile_sparse.compiler.errors import GateFailure, Refusal

if TYPE_CHECKING:
    from compile_sparse.compiler.result import CompileResult

__all__ = ["cli"]

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_EXITS = """
\b
Exit codes: 0 done, every gate passed; 1 internal error; 2 usage or recipe error; 3 a gate failed;
4 refused or unsupported; 5 environment; 130 interrupted (the same command resumes).
"""


@click.group(cls=DefaultGroup, context_settings=_CONTEXT, epilog=_EXITS)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    r"""Compile a trained model for a serving runtime, and prove what it gained.

    \b
    compile-sparse MODEL --target TARGET [options]   compile and verify (the default command)
    """


cli.add_command(runtime_command)
cli.add_command(microbench_command)
cli.add_command(hidden_alias(microbench_command), "probe")  # what it was called


@cli.command("compile", cls=CompilingCommand)
@recipe_options
@click.option("--out", metavar="DIR", help="Artifact folder.  [default: ./MODEL-TARGET]")
@click.option("--no-verify", is_flag=True, help="Do not measure; the verdict is 'unverified'.")
@click.option("--verify-each", is_flag=True, help="Check the program after every pass (slow; for debugging passes).")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@json_option
@debug_option
def compile_command(
    model: str, as_json: bool, no_verify: bool, gates: tuple[str, ...], eval_: Any, **options: Any
) -> None:
    """Compile MODEL for a target, measure it against the dense baseline, and report."""
    from compile_sparse import api

    with TerminalProgress() as progress:
        failure = None
        try:
            result = api.compile(model, verify=not no_verify, gates=gates, eval=eval_, progress=progress, **options)
        except GateFailure as error:
            result, failure = _result_of(error)
    _finish(result, failure, as_json=as_json)


@cli.command("explain", cls=CompilingCommand)
@recipe_options
@json_option
@debug_option
def explain_command(model: str, as_json: bool, gates: tuple[str, ...], eval_: Any, **options: Any) -> int:
    """Show the plan only: what would be removed, what is refused and why, expected bytes. No weights are read.

    Exits with 4 when compiling would be refused.
    """
    from compile_sparse import api

    with TerminalProgress() as progress:
        plan = api.explain(model, gates=gates, eval=eval_, progress=progress, **options)
    if as_json:
        print_json(plan)
    else:
        from compile_sparse.compiler.cli.tables import plan_table

        print_table([plan_table(plan)])
    return Refusal.exit_code if plan.get("refusals") else 0


@cli.command("verify", cls=VerifyingCommand)
@click.argument("artifact", type=click.Path(path_type=Path))
@measurement_options
@click.option("--model", metavar="MODEL", help="Where the dense model is now, if it moved.")
@json_option
@debug_option
def verify_command(artifact: Path, as_json: bool, gates: tuple[str, ...], eval_: Any, **options: Any) -> None:
    """Measure an existing artifact again, against its own baseline."""
    from compile_sparse import api

    with TerminalProgress() as progress:
        failure = None
        try:
            result = api.verify(artifact, gates=gates, eval=eval_, progress=progress, **options)
        except GateFailure as error:
            result, failure = _result_of(error)
    _finish(result, failure, as_json=as_json)


@cli.group("targets", invoke_without_command=True)
@json_option
@debug_option
@click.pass_context
def targets_command(ctx: click.Context, as_json: bool) -> None:
    """List the targets, or 'show NAME' one."""
    if ctx.invoked_subcommand is not None:
        return
    from compile_sparse.compiler.cli.tables import targets_table
    from compile_sparse.compiler.targets.target import load_targets

    targets = [target.model_dump(mode="json") for target in load_targets().values()]
    if as_json:
        print_json(targets)
    else:
        print_table([targets_table(targets)])


@targets_command.command("show")
@click.argument("name")
@json_option
@debug_option
def show_target_command(name: str, as_json: bool) -> None:
    """Everything known about one target."""
    from compile_sparse.compiler.targets.target import find_target

    data = find_target(name).model_dump(mode="json")
    if as_json:
        print_json(data)
        return
    import yaml

    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110), nl=False)


@cli.command("doctor")
@json_option
@debug_option
def doctor_command(as_json: bool) -> None:
    """Show which runtimes work on this machine, and why the others don't."""
    from compile_sparse import api

    probes = api.doctor()
    if as_json:
        print_json(probes)
        return
    from compile_sparse.compiler.cli.tables import doctor_table

    print_table([doctor_table(probes)])


def _result_of(failure: GateFailure) -> tuple[CompileResult, GateFailure]:
    """The result a gate failure carries: artifact and report exist, so they are shown before the error."""
    return failure.result, failure


def _finish(result: CompileResult, failure: GateFailure | None, *, as_json: bool) -> None:
    if as_json:
        print_json(result.report)
    else:
        from compile_sparse.compiler.cli.tables import report_table

        print_table([report_table(result.report)])
        click.echo(str(result.report_path))
    if failure is not None:
        raise failure
