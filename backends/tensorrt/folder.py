"""Write everything a TensorRT artifact's model folder holds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from compile_sparse.backends.checkpoint.modelopt import write_unified
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.external_data import MODEL_FILE
from compile_sparse.backends.onnx.graph_writer import ValueRecord
from compile_sparse.backends.onnx.lower import write_graph
from compile_sparse.backends.tensorrt.description import DESCRIPTION_FILE, Description, Intended, Sparsity, Value
from compile_sparse.backends.tensorrt.engine.engine_build import EngineBuild, build_engines
from compile_sparse.backends.tensorrt.engine.profiles import profiles_for
from compile_sparse.backends.tensorrt.graph.cache import aliases_of
from compile_sparse.backends.tensorrt.graph.dialect import DIALECT
from compile_sparse.backends.tensorrt.graph.lowering import interface_of
from compile_sparse.backends.tensorrt.layout import CHECKPOINT, TWIN
from compile_sparse.backends.tensorrt.options import engine_settings
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import GemmRow, check_sparsity, require_pattern
from compile_sparse.backends.tensorrt.sparsity.sparse_report import sparse_report
from compile_sparse.compiler.capture.side_files import write_labels, write_side_files
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target

__all__ = ["write_folder"]


def write_folder(
    program: Program, prepared: Program, target: Target, out: Path, progress: Progress, settings: RunSettings
) -> Lowered:
    """Write the graph, its engine where one can be built, the description and the unified checkpoint into ``out``.

    Args:
        program: the compiled one, which the checkpoint holds.
        prepared: what the lowering steps made of it, which the graph computes.
        target: what engines are built for.
        out: an empty folder.
        progress: where it is reported.
        settings: what the run chose.
    """
    options, decoder = engine_settings(settings, program.config), program.kind == "decoder"
    emission, files = write_graph(prepared, DIALECT, interface_of(program, options.max_length), out, progress)
    profiles = profiles_for(emission.graph.inputs, options, decoder=decoder)
    pattern, intended, rows = _sparse_gemms(program, out / MODEL_FILE)
    engines = build_engines(out / MODEL_FILE, target, options, profiles, sparse=bool(intended), progress=progress)
    limits = [*_limits(program, options.max_length), *engines.limits]
    description = Description(
        kind=program.kind,
        precision=settings.precision_on(target),
        max_length=options.max_length if decoder else None,
        inputs=_values(emission.graph.inputs),
        outputs=_values(emission.graph.outputs),
        aliases=dict(aliases_of(emission)),
        profiles=profiles,
        sparsity=Sparsity(
            pattern=pattern, intended=tuple(Intended(node=node, tensor=tensor) for node, tensor in intended.items())
        )
        if intended
        else None,
        engines=engines.records,
        limits=tuple(limits),
    )
    files[DESCRIPTION_FILE] = _write_description(description, out)
    files |= {record.file: record.sha256 for record in engines.records}
    files |= write_side_files(program, out)
    if not decoder:
        files |= write_labels(program, out)
    if engines.twin is not None:
        twin = description.model_copy(update={"engines": (engines.twin,), "sparsity": None})
        files[f"{TWIN}/{DESCRIPTION_FILE}"] = _write_description(twin, out / TWIN)
        files[f"{TWIN}/{engines.twin.file}"] = engines.twin.sha256
    diagnostics: list[Diagnostic] = []
    if options.checkpoint:
        written, notes = _checkpoint(program, out / CHECKPOINT, progress)
        files |= written
        diagnostics += notes
    section = None
    if intended:
        diagnostics += _without_kernels(target, pattern, [row for row in rows if row.node in intended])
        section = sparse_report(
            intended,
            engines.built.messages if engines.built else (),
            engines.built.inspector if engines.built else "",
            [profile.name for profile in profiles],
            rows=rows,
            pattern=pattern,
            unverified=engines.unverified,
        ).model_dump(mode="json")
    return Lowered(
        files=files,
        form=_form(emission, engines),
        limits=limits,
        diagnostics=[*diagnostics, *emission.diagnostics],
        sparsity=section,
    )


def _write_description(description: Description, folder: Path) -> str:
    text = description.model_dump_json(indent=2).encode()
    (folder / DESCRIPTION_FILE).write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def _form(emission: Emission, engines: EngineBuild) -> dict[str, object]:
    return {**dict(sorted(emission.forms.items())), "engine": engines.form}


def _sparse_gemms(program: Program, model: Path) -> tuple[str, dict[str, str], list[GemmRow]]:
    """Pattern, GEMMs whose weight was pruned in it (node -> name of its constant), and the state of every GEMM.

    Raises:
        Refusal: CS4501, one of them lost its zeros or cannot be seen from its GEMM.
    """
    masks = {name: mask for name, mask in program.masks.items() if _is_n_of_m(mask.pattern)}
    if not masks:
        return "", {}, []
    pattern, *others = sorted({mask.pattern for mask in masks.values()})
    if others:
        raise Refusal(
            "CS4433",
            "The model has zeros in more than one pattern.",
            where="mask",
            why=f"It has {pattern} and {', '.join(others)}; an engine is built for one.",
            hint="Give one --sparsity.",
        )
    n, m = (int(part) for part in pattern.split(":"))
    rows = check_sparsity(model, n=n, m=m)
    intended: dict[str, str] = {}
    for name in masks:
        reached = [row for row in rows if row.tensor in (name, f"{name}.transposed", f"{name}.inner_first")]
        intended |= {row.node: row.tensor for row in reached}
        if not reached:  # as bad as a weight without zeros: it is named, and fails
            intended[f"(the GEMM of {name})"] = name
    require_pattern(rows, intended, pattern=pattern)
    return pattern, intended, rows


_FORMATS = {"float16": "fp16", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


def _without_kernels(target: Target, pattern: str, rows: Sequence[GemmRow]) -> list[Diagnostic]:
    """CS2371, once per number format that has no sparse kernels on the target as far as its contract knows."""
    rule = target.pattern(pattern)
    if rule is None or not rule.formats:
        return []
    found: dict[str, list[str]] = {}
    for row in rows:
        kind = row.dtype.lower()
        name = "fp8" if kind.startswith("float8") else _FORMATS.get(kind, kind)
        if name not in rule.formats:
            found.setdefault(name, []).append(row.node)
    return [
        Diagnostic(
            nodes[0],
            "CS2371",
            f"{len(nodes):,} GEMMs are {pattern} in {name}; {target.name} is known to have sparse kernels for "
            f"{' and '.join(rule.formats)} only, so expect these to run dense.",
            "Choose w8a8-static or fp16, or see with 'compile-sparse microbench' what the GPU does.",
        )
        for name, nodes in found.items()
    ]


def _is_n_of_m(pattern: str) -> bool:
    n, colon, m = pattern.partition(":")
    return bool(colon) and n.isdigit() and m.isdigit()


def _values(records: Sequence[ValueRecord]) -> tuple[Value, ...]:
    return tuple(Value(name=record.name, dtype=record.kind, shape=record.shape) for record in records)


def _limits(program: Program, length: int) -> list[str]:
    if program.kind != "decoder":
        return []
    return [
        f"The key-value cache holds {length:,} tokens of each request; compile with --max-length for another number.",
        "Bind every present.* output to the memory of its past_key_values.* input: the cache is written in place.",
        "Pad on the right. What lies behind a row's own tokens is never looked at and is overwritten by its next ones.",
    ]


def _checkpoint(program: Program, folder: Path, progress: Progress) -> tuple[dict[str, str], list[Diagnostic]]:
    """The unified Hugging Face checkpoint, or why it cannot say what this model is."""
    folder.mkdir()
    written, notes = write_unified(program, folder, progress)
    if not written:
        shutil.rmtree(folder)
    return {f"{folder.name}/{name}": digest for name, digest in written.items()}, notes
