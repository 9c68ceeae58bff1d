"""Describe a program whose layers differ by ``per_layer_config``: the global config, and what differs by layer number.

transformers (5.15 and later) defines the file format; its own model classes do not build such layers, serving runtimes do. The
gate builds them: a skeleton of the global config whose layers are taken from skeletons of each layer's own sizes. A branch that a
layer leaves out (``"skip": ["mlp"]``) is there as zeros: its output then is exactly zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from compile_sparse.backends.checkpoint.architecture import Architecture, Invalid, Path, assigned
from compile_sparse.backends.checkpoint.candidates import Change, candidates
from compile_sparse.backends.checkpoint.gate import Gate
from compile_sparse.backends.checkpoint.search import Shapes, matching
from compile_sparse.backends.checkpoint.solver import (
    Attempt,
    Solution,
    cache_of,
    first_accepted,
    global_solutions,
    starts,
)
from compile_sparse.backends.checkpoint.tensors import Tensors, resizes
from compile_sparse.compiler.ir.program import Program

__all__ = ["per_layer_shape_solutions", "solve_per_layer"]

MAX_JUDGED = 12
MAX_ALTERNATIVES = 3  # per kind of layer

Signature = tuple[tuple[str, tuple[int, ...]], ...]


class _Layers:
    """The one stack of layers, and the layers that are alike.

    Attributes:
        prefix: of their names.
        alike: shapes by name inside a layer -> numbers of the layers that have them.
    """

    def __init__(self, tensors: Tensors) -> None:
        stacks: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
        self.outside: dict[str, tuple[int, ...]] = {}
        for name in tensors.before:
            parts = name.split(".")
            place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            if place is None:
                if name in tensors.sources:
                    self.outside[name] = tuple(tensors.sources[name].shape)
                continue
            layer = stacks.setdefault(".".join(parts[:place]), {}).setdefault(int(parts[place]), {})
            if name in tensors.sources:
                layer[".".join(parts[place + 1 :])] = tuple(tensors.sources[name].shape)
        self.single = len(stacks) == 1
        self.prefix, layers = next(iter(stacks.items()), ("", {}))
        self.alike: dict[Signature, list[int]] = {}
        for number, shapes in layers.items():
            self.alike.setdefault(tuple(sorted(shapes.items())), []).append(number)

    def names(self, signature: Signature, number: int) -> dict[str, tuple[int, ...]]:
        """Full names of a layer's tensors."""
        return {f"{self.prefix}.{number}.{inner}": shape for inner, shape in signature}


def solve_per_layer(
    program: Program, architecture: Architecture, tensors: Tensors, attempt: Attempt
) -> Solution | None:
    """A global config and overrides that pass the gate, or None."""
    layers, gate = _Layers(tensors), Gate(program)
    if not layers.single:
        return None
    return first_accepted(
        islice(_shape_solutions(program, architecture, tensors, layers, attempt), MAX_JUDGED),
        lambda solution, mode: _skeleton(architecture, solution, layers.prefix, mode),
        lambda skeleton: gate.judge(skeleton, tensors.sources, zero=tensors.left_out),
        attempt,
    )


def per_layer_shape_solutions(
    program: Program, architecture: Architecture, tensors: Tensors, attempt: Attempt
) -> Iterator[Solution]:
    """Global configs and overrides under which every tensor has its shape. No weights are read."""
    layers = _Layers(tensors)
    return _shape_solutions(program, architecture, tensors, layers, attempt) if layers.single else iter(())


def _shape_solutions(
    program: Program, architecture: Architecture, tensors: Tensors, layers: _Layers, attempt: Attempt
) -> Iterator[Solution]:
    left_out = {signature: _left_out_parts(tensors, layers, numbers[0]) for signature, numbers in layers.alike.items()}
    if any(parts is None for parts in left_out.values()):
        return
    common = Counter({signature: len(numbers) for signature, numbers in layers.alike.items()}).most_common(1)[0][0]
    usual = {name: shape for n in layers.alike[common] for name, shape in layers.names(common, n).items()}
    # The global values are those of most layers, unless the config's own rules forbid them.
    for wanted in ({**layers.outside, **usual}, layers.outside):
        for base in islice(global_solutions(program, architecture, tensors, wanted, attempt), MAX_ALTERNATIVES):
            options = [
                list(
                    islice(
                        _overrides(program, architecture, base, layers.names(signature, numbers[0])), MAX_ALTERNATIVES
                    )
                )
                for signature, numbers in layers.alike.items()
            ]
            for chosen in product(*options):
                yield _assembled(base, layers, chosen, left_out)


def _assembled(
    base: Solution, layers: _Layers, chosen: Sequence[dict[str, Any]], left_out: Mapping[Signature, list[str] | None]
) -> Solution:
    per_layer: dict[int, dict[str, Any]] = {}
    config = dict(base.config)
    for (signature, numbers), fields in zip(layers.alike.items(), chosen, strict=True):
        own = dict(fields)
        # A field that a layer overrides must have a global value.
        config |= {name: value for name, value in fields.items() if config.get(name) is None}
        if left_out[signature]:
            own["skip"] = left_out[signature]
        if own:
            per_layer |= {number: dict(own) for number in numbers}
    return Solution(config, base.changes, None, dict(sorted(per_layer.items())))


def _overrides(
    program: Program, architecture: Architecture, base: Solution, wanted: Shapes
) -> Iterator[dict[str, Any]]:
    """Fields that give one layer its shapes on top of the global config; validation does not see overrides."""
    cache = cache_of(program)
    for start in starts(base.config, cache.head_dim):

        def shapes_of(some: Sequence[Change], unchecked: bool, start: Mapping[Path, Any] = start) -> Shapes | None:
            fields = {**start, **{change.path: change.new for change in some}}
            try:
                return architecture.shapes(assigned(architecture.parsed(base.config), fields))
            except Invalid:
                return None

        dense = shapes_of((), True)
        if dense is None or any(name not in dense for name in wanted):
            return
        changes = candidates(base.config, resizes(dense, wanted), (), cache)
        for some in matching([change for change in changes if len(change.path) == 1], wanted, shapes_of):
            yield {str(path[0]): value for path, value in start.items()} | {str(c.path[0]): c.new for c in some}


def _left_out_parts(tensors: Tensors, layers: _Layers, number: int) -> list[str] | None:
    """Parts of a layer that are left out altogether; None when only some tensors of a part are missing."""
    prefix = f"{layers.prefix}.{number}."
    missing, present = set(), set()
    for name in tensors.before:
        if name.startswith(prefix):
            part = name.removeprefix(prefix).split(".")[0]
            if name in tensors.left_out:
                missing.add(part)
            elif name in tensors.sources:
                present.add(part)
    if missing & present:
        return None
    # A norm goes with the branch it feeds; only parts that compute are named.
    return sorted(
        part
        for part in missing
        if any(len(shape) > 1 for name, shape in tensors.before.items() if name.startswith(f"{prefix}{part}."))
    )


def _skeleton(architecture: Architecture, solution: Solution, prefix: str, mode: FakeTensorMode) -> PreTrainedModel:
    """The global skeleton with each layer in its own sizes."""
    whole = architecture.skeleton(architecture.parsed(solution.config), mode)
    made: dict[str, PreTrainedModel] = {}
    container = whole.get_submodule(prefix)
    for number, overrides in solution.per_layer.items():
        sizes: dict[Path, Any] = {(key,): value for key, value in overrides.items() if key != "skip"}
        if not sizes:
            continue
        key = repr(sorted(sizes.items()))
        if key not in made:
            made[key] = architecture.skeleton(assigned(architecture.parsed(solution.config), sizes), mode)
        container[number] = made[key].get_submodule(f"{prefix}.{number}")
    return whole
