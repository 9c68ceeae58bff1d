"""A rule of a contract, and what is raised where one is broken."""

from __future__ import annotations

__all__ = ["NonConforming", "require"]


class NonConforming(AssertionError):
    """Something does not keep its contract; the message names the rule, and where and how it is broken."""


def require(holds: bool, rule: str, where: str, how: str = "") -> None:
    """Raise ``NonConforming`` unless the rule holds."""
    if not holds:
        raise NonConforming(f"{rule} ({where}){': ' + how if how else ''}")
