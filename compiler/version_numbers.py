"""Compare the version numbers of packages."""

from __future__ import annotations

__all__ = ["older"]


def older(version: str, wanted: str) -> bool:
    """Whether ``version`` comes before ``wanted``, by their first three numbers; what is not a number counts as zero."""
    return _numbers(version) < _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)
