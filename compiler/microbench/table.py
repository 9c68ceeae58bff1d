"""A probe's result as a table for people, and its suggestion as YAML for a target file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["probe_table", "suggestion_yaml"]


def probe_table(result: Mapping[str, Any]) -> RenderableType:
    """Device, rows, what is left out, limits and the suggestion."""
    device = result["device"]
    facts = ", ".join(f"{key} {device[key]}" for key in ("torch", "cuda", "driver") if device.get(key))
    head = f"{device['name']} (compute capability {device['compute_capability']}), {facts}, {result['measured_at']}"
    parts: list[RenderableType] = [Text(head)]
    if not result["same_gpu"]:
        parts.append(Text(f"This is not {result['target']}'s GPU; the table says nothing about that target.", "yellow"))
    lacking = _lacking(result["rows"])
    parts.append(_rows([row for row in result["rows"] if row["form"] not in lacking]))
    parts += [Text(f"not measured: {form}: {why}") for form, why in lacking.items()]
    parts += [Text(f"left out: {skip['where']}: {skip['why']}") for skip in result["left_out"]]
    parts += [Text(f"note: {limit}") for limit in result["limits"]]
    if result["suggestion"] is None:
        parts.append(Text("\nNo 2:4 form could be measured, so there is nothing to say of it in a target file."))
    else:
        parts.append(Text("\nWhat this table would say in a target file:"))
        parts.append(Text(suggestion_yaml(result["suggestion"])))
    return Group(*parts)


def suggestion_yaml(suggestion: Mapping[str, Any]) -> str:
    """The entry as it would stand in a target file."""
    text = yaml.safe_dump({"sparse_patterns": [dict(suggestion)]}, sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip()


def _lacking(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Forms that no shape has, for one and the same reason: said once, not per shape."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row["form"], set()).add(row["why_not"])
    return {form: why for form, found in reasons.items() if len(found) == 1 and (why := next(iter(found)))}


def _rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="GEMMs of the linear layers", title_justify="left", title_style="bold")
    for column in ("layers", "N x K", "rows", "form", "us", "over dense", "over its dense twin", "remark"):
        table.add_column(column, overflow="fold", justify="right" if column in ("layers", "rows", "us") else "left")
    before = None
    for row in rows:
        size = (row["outer"], row["inner"], row["rows"])
        first = size != before
        before = size
        shape = (f"{row['layers']}", f"{size[0]} x {size[1]}", f"{size[2]} ({row['regime']})") if first else ("",) * 3
        launches = "launches included" if row["timing"] == "launches" else ""
        remark = row["why_not"] or "; ".join(filter(None, (row["note"], launches)))
        time = "" if row["us"] is None else f"{row['us']:,.1f}"
        cells = (*shape, row["form"], time, _ratio(row["over_dense"]), _ratio(row["over_twin"]), remark)
        table.add_row(*map(escape, cells))
    return table


def _ratio(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['value']:.2f}x ({found['ci95'][0]:.2f} to {found['ci95'][1]:.2f})"
