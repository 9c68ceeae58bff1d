"""Two requests that take from the same thing: what they remove together, and what to write instead."""

from __future__ import annotations

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.pass_contract import Pass

__all__ = ["refuse_repetition", "refuse_second"]


def refuse_second(first: Pass, second: Pass, *, where: str) -> None:
    """Stop when both passes treat the same things.

    Raises:
        Refusal: CS4105.
    """
    if not first.treats & second.treats:
        return
    one, other = (getattr(step, "fraction", None) for step in (first, second))
    if isinstance(one, float) and isinstance(other, float):
        refuse_repetition(_described(first, second), _described(second, first), one, other, where=where)
    raise Refusal(
        "CS4105",
        f"Pass {second.name!r} is asked for twice.",
        where=where,
        why=f"{_described(first, second)} and {_described(second, first)} would both treat the same weights, the second what "
        "the first has left.",
        hint="Write one of them.",
    )


def refuse_repetition(first: str, second: str, one: float, other: float, *, where: str) -> None:
    """Always stop: fraction ``other`` asked of what fraction ``one`` leaves.

    Raises:
        Refusal: CS4105 with the arithmetic.
    """
    both, sum_ = 1.0 - (1.0 - one) * (1.0 - other), one + other
    alternative = f", or {sum_:.6g} if that was meant" if sum_ < 1.0 else ""
    raise Refusal(
        "CS4105",
        f"{first} and {second} take from the same positions.",
        where=where,
        why=f"{one:g} and then {other:g} of what is left remove 1 - {1 - one:.6g} x {1 - other:.6g} = {both:.6g} in all, not "
        f"{sum_:.6g}.",
        hint=f"Write it once: with fraction {both:.6g}{alternative}.",
    )


def _described(step: Pass, other: Pass) -> str:
    """The pass with the option that tells it from the other one."""
    unit = getattr(step, "unit", None)
    return f"{step.name} (unit: {unit})" if unit is not None and unit != getattr(other, "unit", None) else step.name
