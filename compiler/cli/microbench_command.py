"""``compile-sparse microbench``: what fewer bits and 2:4 zeros buy on the GPU at hand."""

from __future__ import annotations

import click

from compile_sparse.compiler.cli.options import debug_option, json_option
from compile_sparse.compiler.cli.rendering import print_json, print_table
from compile_sparse.compiler.cli.terminal_progress import TerminalProgress

__all__ = ["microbench_command"]


@click.command("microbench")
@click.argument("target")
@click.option(
    "--model", metavar="MODEL", required=True, help="Whose linear layers are measured; weights are not needed."
)
@click.option("--workload", metavar="KEY=N,...", help="Rows of the GEMMs and rounds, e.g. prompt=512,batch=8,rounds=7.")
@click.option("--concurrency", metavar="N,...", help="Requests that decode at once, e.g. 1,8,32: each is measured.")
@click.option("--out", metavar="FILE", help="Write the table as JSON, with device, versions and date.")
@click.option("--any-gpu", is_flag=True, help="Measure a GPU that is not the target's.")
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@json_option
@debug_option
def microbench_command(
    target: str,
    model: str,
    workload: str | None,
    concurrency: str | None,
    out: str | None,
    any_gpu: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure int8, fp8 and 2:4 on each GEMM of MODEL's linear layers, with torch on TARGET's GPU.

    Prints a table, and the lines that a target file would have. Not run on a GPU by us yet (unverified).
    """
    from compile_sparse import api

    with TerminalProgress() as progress:
        result = api.probe(
            model,
            target=target,
            workload=workload,
            concurrency=concurrency,
            out=out,
            any_gpu=any_gpu,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        from compile_sparse.compiler.microbench.table import probe_table

        print_table([probe_table(result)])
        if out is not None:
            click.echo(out)
