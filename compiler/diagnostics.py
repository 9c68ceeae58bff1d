"""What passes, backends and deployments have to say about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compile_sparse.compiler.errors import CompileSparseError, Refusal

__all__ = ["Diagnostic", "Severity"]

Severity = Literal["note", "warning", "error"]
"""``error``: asked to go on, whoever said it raises ``Refusal`` with it. ``warning``: something was left alone or will run
slowly. ``note``: worth knowing."""


@dataclass(frozen=True)
class Diagnostic:
    """One thing a pass or backend does not do, and why.

    The same object feeds ``explain``, ``report.json`` and the tests.

    Attributes:
        where: node, tensor or axis.
        code: stable identifier, ``CS`` and four digits.
        why: a sentence; arithmetic included.
        hint: what would make it possible, or empty.
        severity: how much it matters. It decides where a diagnostic is shown and is not written.
    """

    where: str
    code: str
    why: str
    hint: str = ""
    severity: Severity = "warning"

    @classmethod
    def of(cls, error: CompileSparseError) -> Diagnostic:
        """What ``error`` says, for a plan that goes on to say more."""
        return cls(error.where, error.code, f"{error.what} {error.why}".strip(), error.hint, severity="error")

    def refusal(self, what: str) -> Refusal:
        """The error of whoever was asked to go on all the same; ``what`` is one sentence saying what failed."""
        return Refusal(self.code, what, where=self.where, why=self.why, hint=self.hint)

    def as_dict(self) -> dict[str, str]:
        """Plain data for reports."""
        return {"where": self.where, "code": self.code, "why": self.why, "hint": self.hint}
