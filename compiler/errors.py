"""Typed errors: what went wrong, where, why, and what to do about it.

Every error carries a stable code (``CS`` + four digits) and a class that decides the process exit code:

===== ======================= ====
class meaning                 exit
===== ======================= ====
CS1xx usage or recipe error   2
CS2xx model cannot be handled 4
CS3xx a gate failed           3
CS4xx the target refuses      4
CS5xx environment             5
===== ======================= ====
"""

from __future__ import annotations

from typing import ClassVar

from compile_sparse.compiler.result import CompileResult

__all__ = [
    "CompileSparseError",
    "EnvironmentFailure",
    "GateFailure",
    "Interrupted",
    "ModelError",
    "Refusal",
    "UsageError",
]


class CompileSparseError(Exception):
    """Base of every error shown to people.

    Args:
        code: stable identifier, ``CS`` and four digits.
        what: one sentence saying what failed.
        where: the node, file, line or option concerned.
        why: the cause, with the arithmetic when there is one.
        hint: what the user can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.code, self.what, self.where, self.why, self.hint = code, what, where, why, hint

    def __str__(self) -> str:
        parts = [f"{self.code}: {self.what}"]
        for label, text in (("where", self.where), ("why", self.why), ("hint", self.hint)):
            if text:
                parts.append(f"  {label}: {text}")
        return "\n".join(parts)

    def as_dict(self) -> dict[str, str | int]:
        """The same five facts for ``--json`` consumers."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class UsageError(CompileSparseError):
    """The command, recipe or input file is wrong (exit 2)."""

    exit_code = 2


class GateFailure(CompileSparseError):
    """A gate did not hold; artifact and report are written (exit 3).

    Args:
        result: what was written.
    """

    exit_code = 3

    def __init__(
        self, code: str, what: str, *, result: CompileResult, where: str = "", why: str = "", hint: str = ""
    ) -> None:
        super().__init__(code, what, where=where, why=why, hint=hint)
        self.result = result


class ModelError(CompileSparseError):
    """The model cannot be handled as asked (exit 4)."""

    exit_code = 4


class Refusal(CompileSparseError):
    """The target cannot gain from, or cannot express, what was asked (exit 4)."""

    exit_code = 4


class EnvironmentFailure(CompileSparseError):
    """A runtime, device or disk is missing or broke (exit 5)."""

    exit_code = 5


class Interrupted(CompileSparseError):
    """The user stopped the run; the same command resumes (exit 130)."""

    exit_code = 130
