"""What a pass is given in tests, in one place: a target that takes what the test needs, and text or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target

__all__ = ["SCHEMES", "context", "target"]

SCHEMES = ("w8a8", "w8a16", "w4a16", "w4a16-g32")


def target(schemes: tuple[str, ...] = SCHEMES, **changes: Any) -> Target:
    """A target that accepts ``schemes`` and says nothing about sparsity patterns, with some fields changed."""
    fields: dict[str, Any] = {
        "name": "test-cpu",
        "backend": "null",
        "device": "cpu",
        "summary": "A target for tests.",
        "baseline_precision": "fp32",
        "alignment": 1,
        "schemes": dict.fromkeys(schemes, "somehow"),
    }
    return Target(**fields | changes)


def context(
    calibration: CalibrationStream | None = None,
    *,
    goal: Target | None = None,
    schemes: tuple[str, ...] = SCHEMES,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> PassContext:
    """What a pass is given.

    Args:
        calibration: text.
        goal: the target; without one, ``target(schemes, **changes)``.
        schemes, changes: see ``target``.
        options: other fields of ``PassContext``.
    """
    return PassContext(goal or target(schemes, **changes or {}), SilentProgress(), calibration, **options)
