"""Quality in the result table: what each slice says of both models, and how often they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape

from compile_sparse.compiler.cli.numbers import interval, plain

__all__ = ["quality_notes", "quality_rows"]

Row = tuple[str, str, str, str]


def quality_rows(quality: Mapping[str, Any]) -> Iterator[Row]:
    """Label, baseline, compiled and ratio, of the report's section ``quality``."""
    slices = quality.get("slices") or {}
    for name, found in slices.items():
        where = f"[{name}]" + (" (worst)" if name == quality.get("worst_slice") and len(slices) > 1 else "")
        yield from _slice_rows(where, found)


def quality_notes(quality: Mapping[str, Any]) -> Iterator[str]:
    """What slices had to assume or could not judge."""
    for name, found in (quality.get("slices") or {}).items():
        if found.get("note"):
            yield f"[{name}]: {found['note']}"


def _slice_rows(where: str, found: Mapping[str, Any]) -> Iterator[Row]:
    if found.get("ppl_compiled") is not None:
        ratio = interval({"value": found.get("ratio"), "ci95": found.get("ci95")})
        yield escape(f"perplexity {where}"), plain(found.get("ppl_baseline")), plain(found["ppl_compiled"]), ratio
    for name, score in (found.get("scores") or {}).items():
        before, after = score["baseline"], score["compiled"]
        ratio = f"{after / before:.3f}x" if before > 0 else ""
        yield escape(f"{name} {where}"), f"{before:.4f}", f"{after:.4f}", ratio
    if agreement := _agreement(found):
        yield escape(f"agreement with the dense model {where}"), "", agreement, ""


def _agreement(found: Mapping[str, Any]) -> str:
    shown = (
        ("top1_agreement", "top-1 {:.2%}"),
        ("mean_cosine", "cosine {:.4f}"),
        ("rank_agreement", "rank {:.4f}"),
        ("logit_error", "logit error {:.3g}"),
        ("kl", "KL {:.3g}"),
    )
    return ", ".join(text.format(found[key]) for key, text in shown if found.get(key) is not None)
