"""The reason object: why something was left alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Diagnostic"]


@dataclass(frozen=True)
class Diagnostic:
    """One thing a pass or backend did not do, and why.

    The same object feeds ``explain``, ``report.json`` and the tests.

    Attributes:
        where: node, tensor or axis.
        code: stable identifier, ``CS`` and four digits.
        why: a sentence; arithmetic included.
        hint: what would make it possible, or empty.
    """

    where: str
    code: str
    why: str
    hint: str = ""

    @property
    def refuses(self) -> bool:
        """Whether it is the reason of a refusal (codes ``CS4...``): asked to go on, its owner raises ``Refusal`` with it."""
        return self.code.startswith("CS4")

    def as_dict(self) -> dict[str, str]:
        """Plain data for reports."""
        return asdict(self)
