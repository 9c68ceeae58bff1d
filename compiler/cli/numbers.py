"""Numbers of a report as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

__all__ = ["interval", "plain"]


def interval(found: Mapping[str, Any] | None) -> str:
    """A ``{"value", "ci95"}`` of a ratio; empty without a value."""
    if not found or found.get("value") is None:
        return ""
    bounds = found.get("ci95")
    return f"{found['value']:.3f}x" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def plain(value: Any) -> str:
    """A number with four digits, an integer with all of them; other values as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
