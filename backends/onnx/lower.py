"""From a prepared program to ``model.onnx`` and its weight file: what every runtime that reads ONNX does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compile_sparse.backends.onnx.dialect import Dialect
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.external_data import DATA_FILE, MODEL_FILE, ExternalData, Sink
from compile_sparse.backends.onnx.graph_writer import GraphWriter
from compile_sparse.backends.onnx.interface import Interface
from compile_sparse.backends.onnx.protobuf import write_model
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["rehearse", "write_graph"]


def rehearse(program: Program, dialect: Dialect, interface: Interface) -> list[Diagnostic]:
    """Everything that would stop the writing or slow its result, without reading weights."""
    emission = Emission(program, GraphWriter(Sink()), dialect=dialect)
    try:
        interface(emission)
    except Refusal as refusal:
        return [Diagnostic(refusal.where, refusal.code, refusal.why, refusal.hint, severity="error")]
    emission.run()
    return [*emission.unsupported, *emission.diagnostics]


def write_graph(
    program: Program, dialect: Dialect, interface: Interface, out: Path, progress: Progress
) -> tuple[Emission, dict[str, str]]:
    """Write ``program`` as it is into ``out``, weights one at a time; nothing is left behind on failure.

    Args:
        program: after the backend's lowering steps.
        dialect: its emitters.
        interface: the graph's inputs and outputs.
        out: an existing folder.
        progress: where weights are reported.

    Returns:
        The emission and the SHA-256 digest of each file.

    Raises:
        Refusal: CS2311, an operator has no ONNX form; and what ``interface`` refuses.
    """
    data, model = out / DATA_FILE, out / MODEL_FILE
    try:
        with progress.task("write weights", total=len(program.weights)) as task, ExternalData(data) as sink:
            emission = _emit(program, dialect, interface, sink, task.advance)
        digests = {DATA_FILE: sink.sha256, MODEL_FILE: write_model(emission.graph, model, DATA_FILE, dialect)}
    except BaseException:
        data.unlink(missing_ok=True)
        model.unlink(missing_ok=True)
        raise
    return emission, digests


def _emit(
    program: Program, dialect: Dialect, interface: Interface, sink: Sink, on_weight: Callable[[], None]
) -> Emission:
    emission = Emission(program, GraphWriter(sink), on_weight, dialect)
    add_outputs = interface(emission)
    emission.run()
    if emission.unsupported:
        first, more = emission.unsupported[0], len(emission.unsupported) - 1
        raise Refusal(
            "CS2311",
            "This model has operators without an ONNX form.",
            where=first.where,
            why=first.why + (f" And {more} more." if more else ""),
            hint=first.hint,
        )
    add_outputs()
    return emission
