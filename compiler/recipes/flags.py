"""Command-line flags and keyword arguments as a recipe: they are shorthand for one, and override it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension.backends import declared_options, flag_of
from compile_sparse.compiler.extension.pass_contract import PHASES, Pass, Phase
from compile_sparse.compiler.extension.passes import load_pass
from compile_sparse.compiler.files.validation_errors import explained
from compile_sparse.compiler.recipes.building import check_building
from compile_sparse.compiler.recipes.option_values import why_not
from compile_sparse.compiler.recipes.recipe import PassRequest, Recipe
from compile_sparse.compiler.targets.workload import Workload, parse_workload
from compile_sparse.compiler.verify.gates import parse_gate

__all__ = ["Flags", "merge_options"]

# Options that several passes have go to one family of them, in this order.
_PRUNING: tuple[Phase, ...] = ("structural", "depth")
_FACTORING: tuple[Phase, ...] = ("low-rank",)
_ZEROING: tuple[Phase, ...] = ("masks",)
_QUANTIZING: tuple[Phase, ...] = ("quantization",)


@dataclass(frozen=True)
class Flags:
    """Shorthand for parts of a recipe, under the names that Python and the command line use. None: not given."""

    prune: Mapping[str, float] | None = None
    criterion: str | None = None
    allocation: str | None = None
    sparsity: str | None = None
    low_rank: float | None = None
    quantize: str | None = None
    quantizer: str | None = None
    kv_cache: str | None = None
    calibration: str | Path | None = None
    calibration_samples: int | None = None
    sequence_length: int | None = None
    bos: str | None = None
    eval: Mapping[str, str | Path] | None = None
    max_quality_loss: str | float | None = None
    workload: str | Mapping[str, Any] | Workload | None = None
    concurrency: str | Sequence[int] | None = None
    tensor_parallel: int | None = None
    precision: str | None = None
    image_size: str | int | Sequence[int] | None = None
    emit: Sequence[str] | None = None
    gates: Sequence[str] = ()
    require_sparse: int | None = None
    seed: int | None = None


_REQUESTS = (
    ("low_rank", "low-rank", "fraction"),
    ("sparsity", "mask", "pattern"),
    ("quantize", "quantize", "scheme"),
    ("kv_cache", "quantize-cache", "format"),
)
"""Flag, the pass it asks for, and the option of that pass it is the value of."""
_MODIFIERS = (
    ("criterion", (_PRUNING, _FACTORING, _ZEROING), "--prune, --low-rank or --sparsity"),
    ("allocation", (_PRUNING, _FACTORING), "--prune or --low-rank"),
    ("quantizer", (_QUANTIZING,), "--quantize"),
)
"""Flag, which is also the option's name, the families of passes (by phase) that may have it, and the flags that ask for those."""


def merge_options(recipe: Recipe | None = None, **options: Any) -> Recipe:
    """``recipe`` (the empty one when None) with every given option on top.

    A pass that the recipe already has keeps its place and its other options; a new one is inserted by phase. Slices and gates
    are added to the recipe's. ``sequence_length`` holds for calibration and evaluation. ``require_sparse=100`` is the gate
    ``sparse_layers>=100``.

    Args:
        recipe: what is started from.
        options: fields of ``Flags``, and options of installed backends. None is as good as not given.

    Raises:
        UsageError: CS1004 a fraction outside (0, 1) or a number of layers below 1, CS1006 an option without what it
            modifies, CS1007 a value that no such pass accepts, CS1012 a gate on a slice that is not evaluated, CS1105 an option
            that does not exist, and the errors of workloads, gates and recipes.
        Refusal: CS4101 a pass that is not installed.
    """
    flags, of_backends = _sorted(options)
    gates = tuple(flags.gates)
    if flags.require_sparse is not None:
        gates = (*gates, f"sparse_layers>={_layers(flags.require_sparse)}")
    for text in gates:
        parse_gate(text)  # here its error keeps its own words
    base = recipe or Recipe()
    passes = _merged_passes(base.passes, flags)
    data = base.model_dump(exclude={"passes"})
    _merge_data(data, flags)
    data["gates"] = (*base.gates, *gates)
    data["workload"] = _workload(base.workload, flags)
    if flags.precision is not None:
        data["building"]["precision"] = flags.precision
    if flags.image_size is not None:
        data["building"]["image_size"] = flags.image_size
    data["building"]["emit"] = tuple(dict.fromkeys((*base.building.emit, *(flags.emit or ()))))
    data["building"] |= of_backends
    for name in ("bos", "seed"):
        if (value := getattr(flags, name)) is not None:
            data[name] = value
    try:
        merged = Recipe.model_validate(data).model_copy(update={"passes": passes})
    except ValidationError as error:
        raise explained(error, Recipe, None, subject="options") from error
    check_building(merged.building, None, subject="options")
    _check_gate_slices(merged)
    return merged


def _sorted(options: Mapping[str, Any]) -> tuple[Flags, dict[str, Any]]:
    """Flags of every recipe, and options of backends that were given."""
    ours = {field.name for field in fields(Flags)}
    theirs = {name for model in declared_options().values() for name in model.model_fields}
    for name in options:
        if name not in ours | theirs:
            near = difflib.get_close_matches(name, ours | theirs, n=1, cutoff=0.4)
            raise UsageError(
                "CS1105",
                f"{name} is not valid in the options.",
                where=f"options: {name}",
                why=f"There is no option {name!r}. Options: {', '.join(sorted(ours | theirs))}.",
                hint=f"Did you mean {near[0]!r}?" if near else "",
            )
    given = {name: value for name, value in options.items() if value is not None}
    flags = Flags(**{name: value for name, value in given.items() if name in ours})
    return flags, {name: value for name, value in given.items() if name not in ours}


def _workload(base: Workload, flags: Flags) -> Workload:
    wanted = base if flags.workload is None else parse_workload(flags.workload, base)
    for name in ("concurrency", "tensor_parallel"):
        if (value := getattr(flags, name)) is not None:
            wanted = parse_workload({name: value}, wanted)
    return wanted


def _merged_passes(requests: Sequence[PassRequest], flags: Flags) -> tuple[PassRequest, ...]:
    passes = _Passes(requests)
    for kind, fraction in (flags.prune or {}).items():
        passes.put(f"prune-{kind}", where=f"--prune {kind}", fraction=_fraction(fraction, f"--prune {kind}"))
    for flag, name, option in _REQUESTS:
        if (value := getattr(flags, flag)) is not None:
            where = flag_of(flag)
            passes.put(name, where=where, **{option: _fraction(value, where) if option == "fraction" else value})
    for option, families, needs in _MODIFIERS:
        if (value := getattr(flags, option)) is not None:
            passes.modify(value, option, families, needs)
    return passes.ordered()


class _Passes:
    """An ordered list of requests that flags are merged into."""

    def __init__(self, requests: Sequence[PassRequest]) -> None:
        self._requests = list(requests)

    def put(self, name: str, *, where: str, **options: Any) -> None:
        phase = load_pass(name, where=where).phase
        for index, request in enumerate(self._requests):
            if request.name == name:
                self._requests[index] = request.model_copy(update={"options": request.options | options})
                return
        later = PHASES[PHASES.index(phase) + 1 :]
        place = next(
            (i for i, each in enumerate(self._requests) if _class_of(each).phase in later), len(self._requests)
        )
        self._requests.insert(place, PassRequest(name=name, options=options))

    def modify(self, value: str, option: str, families: Sequence[Sequence[Phase]], needs: str) -> None:
        """Set ``option`` on the first family of passes (by phase) of which some accept the value; only on those."""
        refused: dict[str, str] = {}
        asked: list[str] = []
        for phases in families:
            fitting = []
            for index, request in enumerate(self._requests):
                found = _class_of(request)
                if found.phase not in phases:
                    continue
                asked.append(request.name)
                field = found.model_fields.get(option)
                if field is None:
                    continue
                if reason := why_not(field, value):
                    refused[request.name] = reason
                else:
                    fitting.append(index)
            for index in fitting:
                request = self._requests[index]
                self._requests[index] = request.model_copy(update={"options": request.options | {option: value}})
            if fitting:
                return
        if refused:
            raise UsageError(
                "CS1007",
                f"{value!r} is not a value of --{option} that the recipe's passes accept.",
                where=f"--{option} {value}",
                why=" ".join(f"{name} {reason}" for name, reason in refused.items()),
            )
        raise UsageError(
            "CS1006",
            f"--{option} has nothing to apply to.",
            where=f"--{option} {value}",
            why=f"{', '.join(asked)}: no such option."
            if asked
            else f"It modifies {needs}, and neither the flags nor the recipe ask for that.",
        )

    def ordered(self) -> tuple[PassRequest, ...]:
        return tuple(self._requests)


def _class_of(request: PassRequest) -> type[Pass]:
    return load_pass(request.name, where=request.where)


def _fraction(value: float, where: str) -> float:
    if not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise UsageError(
            "CS1004",
            f"{value!r} is not a fraction that can be removed.",
            where=where,
            why="It must lie strictly between 0 and 1.",
            hint="0.25 removes a quarter.",
        )
    return float(value)


def _layers(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(
            "CS1004",
            f"{value!r} is not a number of layers that can be required.",
            where="--require-sparse",
            why="It must be a whole number, 1 or more.",
            hint="100 means that at least 100 layers must run sparse kernels in every profile.",
        )
    return value


def _merge_data(data: dict[str, Any], flags: Flags) -> None:
    if flags.calibration is not None:
        data["calibration"] = (data["calibration"] or {}) | {"file": str(flags.calibration)}
    if flags.calibration_samples is not None:
        if data["calibration"] is None:
            raise UsageError(
                "CS1006",
                "--calibration-samples has nothing to apply to.",
                where="--calibration-samples",
                why="No calibration file is given.",
                hint="Add --calibration FILE.",
            )
        data["calibration"]["samples"] = flags.calibration_samples
    if flags.sequence_length is not None:
        data["evaluation"]["sequence_length"] = flags.sequence_length
        if data["calibration"] is not None:
            data["calibration"]["sequence_length"] = flags.sequence_length
    if flags.max_quality_loss is not None:
        data["evaluation"]["max_loss"] = flags.max_quality_loss
    data["evaluation"]["slices"] |= {name: str(file) for name, file in (flags.eval or {}).items()}


def _check_gate_slices(recipe: Recipe) -> None:
    """A gate on a slice nobody measures can only fail, after an hour of work; say so now."""
    known = recipe.evaluation.slices
    for text in recipe.gates:
        gate = parse_gate(text)
        if gate.metric.by_slice and gate.selector not in known:
            raise UsageError(
                "CS1012",
                f"Gate {text!r} names a slice that is not evaluated.",
                where="--gate",
                why=f"Evaluated slices: {', '.join(known) or 'none'}.",
                hint=f"Add --eval {gate.selector}=FILE.",
            )
