"""The report of the quality benchmark as Markdown, and what is missed in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quality_references.registry import KINDS

__all__ = ["markdown", "missed"]

TITLES = {
    "channels": "MLP channels, 25 % of each layer's",
    "heads": "Key-value groups, 25 % of each layer's",
    "layers": "Layers, 25 %",
    "width": "Hidden width, 12.5 %",
    "low-rank": "Low rank, every linear of a layer at 80 % of its parameters",
}
PARAMETER_SLACK = 1.002
"""A reference that leaves this much more than ours still counts as the same size (biases, rounding of ranks)."""
Row = Mapping[str, Any]


def markdown(report: Mapping[str, Any]) -> str:
    """One table per kind, best first, and a comparison of the best rows."""
    dense, settings = report["dense"], report["settings"]
    slices = list(settings["windows"])
    perplexities = ", ".join(f"{name} {dense['ppl'][name]:.2f}" for name in [*slices, "all"])
    lines = [
        f"Dense: {dense['parameters'] / 1e6:.2f} M parameters, perplexity {perplexities}. "
        f"Windows of {settings['sequence']} tokens: {settings['calibration_windows']} for calibration, "
        + ", ".join(f"{count} of {name}" for name, count in settings["windows"].items())
        + ". Numbers are perplexity over dense perplexity; brackets are 95 % intervals (paired bootstrap over windows).",
    ]
    for kind in KINDS:
        rows = {name: row for name, row in report["rows"].items() if row["kind"] == kind}
        if rows:
            lines += ["", f"### {TITLES[kind]}", "", *_table(rows, slices)]
    return "\n".join([*lines, "", "### Best of each kind", "", *_comparison(report), ""])


def _table(rows: Mapping[str, Row], slices: list[str]) -> list[str]:
    head = ["row", "all", "worst slice", *slices, "KL", "parameters", "CPU s", "after"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["scores"]["all"]["ratio"]):
        scores = row["scores"]
        low, high = scores["all"]["ci95"]
        worst = _worst(row)
        cells = [
            f"**{name}**" if row["ours"] else name,
            f"{scores['all']['ratio']:.4f} ({low:.3f}-{high:.3f})",
            f"{scores[worst]['ratio']:.4f} ({worst})",
            *(f"{scores[s]['ratio']:.3f}" for s in slices),
            f"{scores['all']['kl']:.4f}",
            f"{row['parameters'] / 1e6:.3f} M",
            f"{row['cpu_s']:.1f}",
            _source(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _source(row: Row) -> str:
    if row["ours"]:
        steps = row["source"]["passes"].items()
        return "; ".join(f"`{name}` {', '.join(f'{k}={v}' for k, v in options.items())}" for name, options in steps)
    notes = "; ".join(f"{key} {value}" for key, value in row["notes"].items())
    return f"{row['source']}" + (f" ({notes})" if notes else "")


def _worst(row: Row) -> str:
    slices = [name for name in row["scores"] if name != "all"]
    return max(slices, key=lambda name: row["scores"][name]["ratio"])


def _damage(row: Row) -> tuple[float, float]:
    """Ratio over all and of the worst slice."""
    return row["scores"]["all"]["ratio"], row["scores"][_worst(row)]["ratio"]


def _sides(report: Mapping[str, Any], kind: str) -> tuple[str | None, list[str]]:
    """Our best row of a kind, and the references that leave no more parameters than it (than the dense model), best first."""
    rows: Mapping[str, Row] = {name: row for name, row in report["rows"].items() if row["kind"] == kind}
    ordered = sorted(rows, key=lambda name: _damage(rows[name]))
    ours = next((name for name in ordered if rows[name]["ours"]), None)
    allowed = rows[ours]["parameters"] * PARAMETER_SLACK if ours else report["dense"]["parameters"]
    return ours, [name for name in ordered if not rows[name]["ours"] and rows[name]["parameters"] <= allowed]


def _comparison(report: Mapping[str, Any]) -> list[str]:
    lines = ["| kind | ours | all | worst | best reference of the size | all | worst |", f"|{'---|' * 7}"]
    for kind in KINDS:
        ours, references = _sides(report, kind)
        cells = [kind]
        for name in (ours, references[0] if references else None):
            cells += [name, *(f"{value:.4f}" for value in _damage(report["rows"][name]))] if name else ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def missed(report: Mapping[str, Any]) -> list[str]:
    """One sentence per reference that beats ours, over all or on its worst slice, and per kind with no row of ours."""
    found = []
    for kind in KINDS:
        ours, references = _sides(report, kind)
        if ours is None or not references:
            found.append(f"{kind}: no row of {'ours' if ours is None else 'a reference of the size'} to compare.")
            continue
        mine = _damage(report["rows"][ours])
        for name in references:
            theirs = _damage(report["rows"][name])
            if any(a > b for a, b in zip(mine, theirs, strict=True)):
                found.append(f"{kind}: {ours} {mine[0]:.4f}/{mine[1]:.4f}, {name} {theirs[0]:.4f}/{theirs[1]:.4f}.")
    return found
