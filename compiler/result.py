"""What a compilation gives, also when a gate failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CompileResult"]


@dataclass(frozen=True)
class CompileResult:
    """What a compilation gave.

    Attributes:
        verdict: ``faster``, ``smaller-only``, ``no-gain``, ``slower`` or ``unverified``.
        report: plain data of ``report.json``.
        artifact: the artifact's folder.
        report_path: the report in it.
    """

    verdict: str
    report: Mapping[str, Any]
    artifact: Path
    report_path: Path
