"""Find the config under which the architecture computes what a program computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from compile_sparse.backends.checkpoint.architecture import Architecture, Invalid, Path, assigned, changed
from compile_sparse.backends.checkpoint.candidates import Cache, Change, candidates, sliced_lists
from compile_sparse.backends.checkpoint.gate import Gate, Verdict
from compile_sparse.backends.checkpoint.search import Shapes, matching
from compile_sparse.backends.checkpoint.tensors import Tensors, resizes
from compile_sparse.compiler.capture.skeleton import new_fake_mode
from compile_sparse.compiler.ir.program import Program

__all__ = [
    "Attempt",
    "Solution",
    "cache_of",
    "first_accepted",
    "global_solutions",
    "shape_solutions",
    "solve",
    "starts",
]


MAX_JUDGED = 6
"""Configs of the right shapes that are run. The right one is among the first; later ones change fields that no shape shows."""


@dataclass(frozen=True)
class Solution:
    """A config and what it belongs to.

    Attributes:
        config: plain data for the config class.
        changes: fields that differ from the config as captured.
        verdict: of the gate; None when it was not asked.
        per_layer: overrides by layer, for runtimes that read ``per_layer_config``.
    """

    config: Mapping[str, Any]
    changes: Mapping[Path, Any]
    verdict: Verdict | None = None
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class Attempt:
    """What the search met on its way, for the reason of a refusal.

    Attributes:
        rejected: configs of the right shapes that compute something else, each with the gate's verdict.
        invalid: what the class said about configs that might have had the right shapes.
    """

    rejected: list[tuple[Solution, Verdict]] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)


def solve(program: Program, architecture: Architecture, tensors: Tensors, attempt: Attempt) -> Solution | None:
    """The first config, fewest changes first, that has every shape and passes the gate; None when there is none."""
    gate = Gate(program)
    return first_accepted(
        islice(shape_solutions(program, architecture, tensors, attempt), MAX_JUDGED),
        lambda solution, mode: architecture.skeleton(architecture.parsed(solution.config), mode),
        lambda skeleton: gate.judge(skeleton, tensors.sources),
        attempt,
    )


def first_accepted(
    solutions: Iterable[Solution],
    skeleton: Callable[[Solution, FakeTensorMode], PreTrainedModel],
    judge: Callable[[PreTrainedModel], Verdict],
    attempt: Attempt,
) -> Solution | None:
    """The first of ``solutions`` whose class can be built and passes the gate, with its verdict; those that fail are recorded.

    Args:
        solutions: in order of preference.
        skeleton: the class under a solution, without values; ``Invalid`` where it rejects the config.
        judge: the gate.
        attempt: what was tried.
    """
    for solution in solutions:
        try:
            made = skeleton(solution, new_fake_mode())
        except Invalid:
            continue
        verdict = judge(made)
        if verdict.accepted:
            return replace(solution, verdict=verdict)
        attempt.rejected.append((solution, verdict))
    return None


def shape_solutions(
    program: Program, architecture: Architecture, tensors: Tensors, attempt: Attempt
) -> Iterator[Solution]:
    """Configs under which every tensor has the program's shape, the fewest changes first. No weights are read."""
    if tensors.left_out:
        return iter(())
    return global_solutions(program, architecture, tensors, tensors.shapes, attempt)


def global_solutions(
    program: Program, architecture: Architecture, tensors: Tensors, wanted: Shapes, attempt: Attempt
) -> Iterator[Solution]:
    """Configs under which the tensors in ``wanted`` have these shapes and there are no more blocks than are left."""
    lists = sliced_lists(architecture.config, tensors.stacks)
    counts = {(stack.old, len(stack.kept)) for stack in tensors.stacks}
    cache = cache_of(program)
    changes = candidates(architecture.config, resizes(tensors.before, wanted), tensors.stacks, cache)
    for start in starts(architecture.config, cache.head_dim):
        config = changed(architecture.config, start)

        def settings(some: Sequence[Change], start: Mapping[Path, Any] = start) -> dict[Path, Any]:
            fields = {**start, **{change.path: change.new for change in some}}
            return {**lists, **fields} if any((c.old, c.new) in counts for c in some) else fields

        def shapes_of(some: Sequence[Change], unchecked: bool, config: Mapping[str, Any] = config) -> Shapes | None:
            own = {change.path: change.new for change in some}
            # A field that only happens to be as large as the number of blocks must not take the lists with it.
            for fields in (settings(some), own) if unchecked else (settings(some),):
                try:
                    if unchecked:
                        return architecture.shapes(assigned(architecture.parsed(config), fields))
                    return architecture.shapes(architecture.parsed(changed(config, fields)))
                except Invalid as error:
                    if not unchecked:
                        attempt.invalid.append(str(error))
            return None

        for some in matching(changes, wanted, shapes_of, allowed=tensors.before):
            yield Solution(changed(config, settings(some)), settings(some))


def starts(config: Mapping[str, Any], head_dim: int | None) -> list[dict[Path, Any]]:
    """Nothing; then, where the config does not state the size of a head, the one the cache has.

    Classes that derive it from width and heads then no longer do, if they read the field at all.
    """
    derived = head_dim is not None and config.get("head_dim") is None
    return [{}, {("head_dim",): head_dim}] if derived else [{}]


def cache_of(program: Program) -> Cache:
    """Sizes of the cached keys."""
    shapes = [program.node(e.placeholder).meta["val"].shape for e in program.inputs if e.role == "past_key"]
    sizes = {int(shape[3]) for shape in shapes}
    return Cache(frozenset(int(shape[1]) for shape in shapes), sizes.pop() if len(sizes) == 1 else None)
