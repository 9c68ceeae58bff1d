"""Four numbers per profile: layers that were made sparse, eligible, chosen by TensorRT, and run by a sparse kernel.

What was intended comes from the compiler, the next two from the builder's log, the last from the engine inspector. They are
counted in ONNX nodes that were made sparse, so that they compare; TensorRT's own counts, in its layers, stand beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from compile_sparse.backends.tensorrt.sparsity.inspector import Kernels, kernels_by_profile
from compile_sparse.backends.tensorrt.sparsity.layer_names import nodes_of
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import GemmRow
from compile_sparse.backends.tensorrt.sparsity.sparse_log import (
    LayerList,
    Selection,
    memory_lines,
    selections,
    selections_by_profile,
)
from compile_sparse.compiler.artifact.report import (
    GraphSparsity,
    SparseLayer,
    SparseProfile,
    SparseProfileLayer,
    SparseShape,
    Sparsity,
)

__all__ = ["graph_sparsity", "sparse_report"]


def graph_sparsity(rows: Sequence[GemmRow], intended: Mapping[str, str], pattern: str = "2:4") -> GraphSparsity:
    """The check of the ONNX file as a part of the report.

    Args:
        rows: of ``check_sparsity``.
        intended: name of a GEMM's node -> name of its weight.
        pattern: that the rows were checked for.
    """
    layers = tuple(
        SparseLayer(
            node=row.node, tensor=row.tensor, dtype=row.dtype, k=row.k, n=row.n, state=row.state, remarks=row.remarks
        )
        for row in rows
        if row.node in intended
    )
    unintended = tuple(row.node for row in rows if row.node not in intended and row.state == pattern)
    return GraphSparsity(states=dict(Counter(row.state for row in rows)), layers=layers, unintended=unintended)


def sparse_report(
    intended: Mapping[str, str],
    messages: Iterable[str],
    inspector_json: str,
    profiles: Sequence[str],
    *,
    rows: Sequence[GemmRow] = (),
    pattern: str = "2:4",
    unverified: str = "",
) -> Sparsity:
    """What became of the GEMMs that were made sparse.

    Args:
        intended: name of a GEMM's node -> name of its weight.
        messages: the builder's log, see ``sparse_log.selections``.
        inspector_json: the engine inspector's answer, or empty.
        profiles: names of the optimization profiles, in the engine's order.
        rows: of ``check_sparsity``: states and shapes.
        pattern: that was made.
        unverified: why no builder chose kernels on the target's GPU, a sentence. It is then all that is said beside the graph.

    Returns:
        The section; a number that the log or the inspector cannot give is absent, never zero.
    """
    graph = graph_sparsity(rows, intended, pattern) if rows else None
    if unverified:
        return Sparsity(pattern=pattern, intended=len(intended), in_graph=graph, unverified=unverified)
    log = list(messages)
    found = selections(log)
    chosen = selections_by_profile(found, len(profiles))
    kernels = kernels_by_profile(inspector_json, len(profiles))
    sections = {
        name: _profile(intended, selection, kernel, rows)
        for name, selection, kernel in zip(profiles, chosen, kernels, strict=True)
    }
    notes = list(_notes(sections, dict(zip(profiles, kernels, strict=True)), len(found), memory_lines(log)))
    return Sparsity(pattern=pattern, intended=len(intended), in_graph=graph, profiles=sections, notes=tuple(notes))


def _profile(
    intended: Mapping[str, str], selection: Selection | None, kernels: Kernels, rows: Sequence[GemmRow]
) -> SparseProfile:
    eligible = _named(selection.eligible if selection else None)
    chosen = _named(selection.chosen if selection else None)
    layers = tuple(
        SparseProfileLayer(
            node=node,
            eligible=None if eligible is None else node in eligible,
            chosen=None if chosen is None else node in chosen,
            kernel=kernels.runs_sparse(node),
        )
        for node in intended
    )
    return SparseProfile(
        eligible=_count(layer.eligible for layer in layers) if eligible is not None else None,
        chosen=_count(layer.chosen for layer in layers) if chosen is not None else None,
        kernels=_kernels(layers),
        logged_eligible=selection.eligible.count if selection and selection.eligible else None,
        logged_chosen=selection.chosen.count if selection and selection.chosen else None,
        layers=layers,
        declined=_declined(layers, rows) if chosen is not None else None,
    )


def _named(layers: LayerList | None) -> frozenset[str] | None:
    """ONNX nodes that a line of the log is about; None when it does not name them."""
    if layers is None or (layers.names is None and layers.count):
        return None
    return frozenset(node for name in layers.names or () for node in nodes_of(name))


def _count(answers: Iterable[bool | None]) -> int:
    return sum(bool(answer) for answer in answers)


def _kernels(layers: Sequence[SparseProfileLayer]) -> int | None:
    """GEMMs known to run a sparse kernel; None when nothing is known of any."""
    if layers and all(layer.kernel is None for layer in layers):
        return None
    return _count(layer.kernel for layer in layers)


def _declined(layers: Sequence[SparseProfileLayer], rows: Sequence[GemmRow]) -> tuple[SparseShape, ...]:
    by_node = {row.node: row for row in rows}
    shapes: dict[tuple[int, int, str], list[str]] = {}
    for layer in layers:
        row = by_node.get(layer.node)
        if row is not None and not layer.chosen:
            shapes.setdefault((row.k, row.n, row.dtype), []).append(layer.node)
    return tuple(
        SparseShape(k=k, n=n, dtype=dtype, layers=len(nodes), example=nodes[0])
        for (k, n, dtype), nodes in sorted(shapes.items())
    )


def _notes(
    sections: Mapping[str, SparseProfile], kernels: Mapping[str, Kernels], pairs: int, short_of_memory: int
) -> Iterable[str]:
    if not pairs:
        yield "The builder's log says nothing about sparsity: it is not known which layers were eligible or chosen."
    elif len(sections) > 1 and pairs < len(sections):
        yield f"The log has {pairs:,} selection(s) of kernels for {len(sections):,} profiles; the last holds for all here."
    for name, section in sections.items():
        if section.chosen == 0:
            yield f"TensorRT chose no sparse kernel in profile {name!r}: the zeros save nothing there."
        if section.chosen is None and section.logged_chosen:
            yield (
                f"The log counts {section.logged_chosen:,} layers with sparse kernels in profile {name!r} but does not name "
                "them, so it is not known whether they are the ones that were made sparse."
            )
        if section.eligible is not None and section.layers is not None and section.eligible < len(section.layers):
            missing = len(section.layers) - section.eligible
            yield f"TensorRT did not find {missing:,} of the layers that were made sparse eligible in profile {name!r}."
        unknown = sum(layer.kernel is None for layer in section.layers or ())
        if kernels[name].why_unknown:
            yield f"Kernels of profile {name!r} are not known. {kernels[name].why_unknown}"
        elif unknown:
            yield f"The inspector does not name the kernels of {unknown:,} layers that were made sparse, profile {name!r}."
    if short_of_memory:
        yield (
            f"{short_of_memory:,} lines of the builder's log say that kernels were left out for lack of memory; sparse ones may "
            "have been among them. Build with more free memory."
        )
