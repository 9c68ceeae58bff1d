"""Write a graph and its weights: two files, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.external_data import DATA_FILE, MODEL_FILE, ExternalData, Sink
from compile_sparse.backends.onnx.protobuf import write_model
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["DATA_FILE", "MODEL_FILE", "refuse_unsupported", "write_files"]


def write_files(
    program: Program, out: Path, emit: Callable[[Sink, Callable[[], None]], Emission], progress: Progress
) -> tuple[Emission, dict[str, str]]:
    """Write ``model.onnx`` and its weight file into ``out``; nothing is left behind on failure.

    Args:
        program: what ``emit`` emits, for its number of weights.
        out: an existing folder.
        emit: given where weights go and what to call after each.
        progress: where weights are reported.

    Returns:
        The emission and the SHA-256 digest of each file.
    """
    data, model = out / DATA_FILE, out / MODEL_FILE
    try:
        with progress.task("write weights", total=len(program.weights)) as task, ExternalData(data) as sink:
            emission = emit(sink, task.advance)
        digests = {DATA_FILE: sink.sha256, MODEL_FILE: write_model(emission.graph, model, DATA_FILE, emission.dialect)}
    except BaseException:
        data.unlink(missing_ok=True)
        model.unlink(missing_ok=True)
        raise
    return emission, digests


def refuse_unsupported(emission: Emission) -> None:
    """Stop when something could not be emitted.

    Raises:
        Refusal: CS2311, naming the first operator and how many more there are.
    """
    if not emission.unsupported:
        return
    first, more = emission.unsupported[0], len(emission.unsupported) - 1
    raise Refusal(
        "CS2311",
        "This model has operators without an ONNX form.",
        where=first.where,
        why=first.why + (f" And {more} more." if more else ""),
        hint=first.hint,
    )
