"""Is a target complete and free of contradictions (``compiler/targets/target.py``)?"""

from __future__ import annotations

from importlib.metadata import entry_points

from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.targets.target import Target
from compile_sparse.testing.conformance import require

__all__ = ["check_target"]


def check_target(target: Target) -> None:
    """Hold ``target`` to what users of the registry rely on.

    Its backend is installed; its precisions contain the baseline's; its schemes exist, say how they run, and none is refused as
    well; fallbacks are among them; a sparsity pattern has one entry with its mechanism and, where it does not pay, a measurement
    and what to do instead; versions are numbers.

    Raises:
        NonConforming: naming the rule.
    """
    where = target.name
    backends = {entry.name for entry in entry_points(group="compile_sparse.backends")}
    require(target.backend in backends, "The backend is installed", where, target.backend)
    if target.precisions:
        require(
            target.baseline_precision in target.precisions, "The baseline's precision is one of its precisions", where
        )
    unknown = sorted((set(target.schemes) | set(target.refused_schemes)) - set(SCHEMES))
    require(not unknown, "Quantization schemes exist", where, ", ".join(unknown))
    both = sorted(set(target.schemes) & set(target.refused_schemes))
    require(not both, "No scheme is both run and refused", where, ", ".join(both))
    silent = [
        name
        for table in (target.schemes, target.refused_schemes, target.cache_formats)
        for name in table
        if not table[name]
    ]
    require(not silent, "Every scheme says how it runs, or why not", where, ", ".join(silent))
    named = {name for first, others in target.fallbacks.items() for name in (first, *others)}
    strange = sorted(name for name in named if name not in target.schemes or SCHEMES[name].weights.kind != "int")
    require(not strange, "Fallbacks are between integer schemes that it runs", where, ", ".join(strange))
    for entry in target.sparse_patterns:
        what = f"{where}, pattern {entry.pattern}"
        require(bool(entry.why), "A pattern says its mechanism", what)
        if not entry.pays:
            require(bool(entry.measured), "A pattern that does not pay has a measurement with its setting", what)
            require(bool(entry.instead), "A pattern that does not pay says what to use instead", what)
    names = [entry.pattern for entry in target.sparse_patterns]
    require(len(names) == len(set(names)), "A pattern has one entry", where)
    for package, version in target.minimum_versions.items():
        numbers = all(part.isdigit() for part in version.split("."))
        require(numbers, "Versions are numbers with dots", f"{where}, {package}", version)
