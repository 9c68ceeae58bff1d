"""The dense program against transformers: the model's own class, loaded by transformers' own loader, on the same inputs.

Everything later is compared with the program. This is what the program itself is compared with, once per compilation: every
tensor, bit for bit, with what transformers loads from the same files, and the outputs of one forward. Weights are loaded one at
a time, so memory follows the largest operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compile_sparse.compiler.artifact.report import DiagnosticEntry, SourceSection
from compile_sparse.compiler.capture.loading import LoadedClass
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import CompileSparseError, ModelError
from compile_sparse.compiler.execution.disturbed import DisturbedExecutor
from compile_sparse.compiler.execution.executor import Executor, Observer
from compile_sparse.compiler.execution.streamed import run_streamed
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.verify.class_outputs import (
    class_arguments,
    largest_difference,
    program_inputs,
    rounding_bound,
    without_cache,
)
from compile_sparse.compiler.verify.rounding import LEAST_RELATIVE, NOISE_FACTOR, rounding_of

__all__ = ["check_source", "unused_tensors"]

LISTED = 100
"""Unused tensors that a report names; their number is said in any case."""

Outputs = dict[str, torch.Tensor]


def check_source(program: Program, loaded: LoadedClass, progress: Progress) -> SourceSection:
    """Compare the dense ``program`` with ``loaded``, the same folder as transformers loads it.

    Raises:
        ModelError: CS2011 when a tensor has other values, or the outputs differ by more than rounding explains.
    """
    model, name = loaded.model, type(loaded.model).__name__
    section = SourceSection(
        model_class=name,
        unused=loaded.unused[:LISTED],
        skips=tuple(DiagnosticEntry(**each.as_dict()) for each in unused_tensors(loaded.unused)),
    )
    ours = {name: program.weights[stored] for name, stored in _bound(program).items() if name in loaded.sources}
    sources: dict[str, TensorSource] = {
        name: _Compared(name, source, ours[name]) if name in ours else source for name, source in loaded.sources.items()
    }
    inputs = program_inputs(program)
    with progress.task(f"compare with {name}", total=2) as task:
        executor = Executor(program, cache_bytes=0)
        try:
            with _block_outputs(model) as theirs:
                found, read = run_streamed(model, sources, class_arguments(program, inputs))
        except CompileSparseError:
            raise
        except Exception as error:  # noqa: BLE001 - a forward of another library: what it cannot do streamed is not our model's fault
            found, read, reason = {}, set(), f"{type(error).__name__}: {error}"[:200]
        else:
            reason = ""
        for each in sorted(ours.keys() - read):
            sources[each].load()
        task.advance()
        section = section.model_copy(update={"tensors": len(ours), "not_run": reason})
        if reason:
            return section
        mine: Outputs = {}
        expected = without_cache(program, executor.run(inputs, observe=_observers(program, theirs, mine)))
        task.advance()
    difference, bound = largest_difference(expected, found), rounding_bound(program)
    if not difference <= bound:
        # A network may amplify rounding: what that amounts to is measured.
        disturbed = DisturbedExecutor(program, relative=rounding_of("fp32"), seed=0, cache_bytes=0).run(inputs)
        noise = largest_difference(expected, without_cache(program, disturbed))
        bound = max(bound, NOISE_FACTOR * noise + LEAST_RELATIVE)
    if not difference <= bound:
        raise ModelError(
            "CS2011",
            f"The captured program does not compute what {name} computes.",
            where=_first_wrong(theirs, mine) or name,
            why=f"The outputs differ by {difference:.2g} of their largest value; rounding explains {bound:.2g}. "
            f"All {len(ours):,} tensors are those that transformers loads.",
            hint="This is a defect of compile-sparse in capturing this class; report it with the config.json.",
        )
    return section.model_copy(update={"difference": difference, "bound": bound})


def unused_tensors(names: tuple[str, ...]) -> list[Diagnostic]:
    """What is to be said about stored tensors that the model does not use."""
    if not names:
        return []
    some = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return [
        Diagnostic(
            names[0],
            "CS2012",
            f"The checkpoint has {len(names):,} tensors that the model does not use: {some}.",
            "If the model was trained with them, its config.json is not the one that was saved with these weights.",
        )
    ]


def _bound(program: Program) -> dict[str, str]:
    """State-dict name -> tensor of the graph that stands for it."""
    bound = {binding.tensor: binding.tensor for binding in program.bindings.values()}
    return bound | {alias: name for alias, name in program.aliases.items() if name in bound}


@dataclass(frozen=True)
class _Compared:
    """What transformers loads, after it was found equal to what the program has."""

    name: str
    theirs: TensorSource
    ours: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.theirs.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.theirs.dtype

    def load(self) -> torch.Tensor:
        theirs, ours = self.theirs.load(), self.ours.load()
        if theirs.dtype == ours.dtype and torch.equal(theirs, ours):
            return theirs
        same = theirs.shape == ours.shape
        differ = int((theirs != ours).sum()) if same else theirs.numel()
        raise ModelError(
            "CS2011",
            f"The program has other values for {self.name!r} than transformers loads.",
            where=self.name,
            why=f"{differ:,} of {theirs.numel():,} elements differ."
            if same
            else f"It is {list(ours.shape)}, transformers has {list(theirs.shape)}.",
            hint="This is a defect of compile-sparse in reading this checkpoint; load and save the model once with transformers.",
        )


@contextmanager
def _block_outputs(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What the blocks (members of lists of modules) give in the context, by path in the order they run."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            for place, block in module.named_children():
                handles.append(block.register_forward_hook(_noting(found, f"{path}.{place}" if path else place)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _noting(found: dict[str, torch.Tensor], path: str) -> Any:
    def note(module: torch.nn.Module, arguments: Any, result: Any) -> None:
        value = result[0] if isinstance(result, tuple) and result else result
        if isinstance(value, torch.Tensor):
            found[path] = value

    return note


def _observers(program: Program, blocks: Mapping[str, torch.Tensor], mine: Outputs) -> dict[str, Observer]:
    """Observers that note what the program has where each of the ``blocks`` ends: its last node of the block's code."""
    ends: dict[str, str] = {}
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            stack = (node.meta.get("nn_module_stack") or {}).values()
            ends.update({str(entry[0]): node.name for entry in stack if isinstance(entry, tuple)})
    by_node: dict[str, list[str]] = {}
    for path in blocks:
        if path in ends:
            by_node.setdefault(ends[path], []).append(path)

    def observer(paths: list[str]) -> Observer:
        return lambda value: mine.update(dict.fromkeys(paths, value))

    return {node: observer(paths) for node, paths in by_node.items()}


def _first_wrong(theirs: Mapping[str, torch.Tensor], mine: Mapping[str, torch.Tensor]) -> str:
    """The first block whose output differs; empty where no block's does, or that cannot be told."""
    for path, value in theirs.items():
        known = path in mine and mine[path].shape == value.shape
        if known and not largest_difference({path: value}, {path: mine[path]}) <= LEAST_RELATIVE:
            return path
    return ""
