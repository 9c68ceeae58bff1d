"""From a measured table to what a target file may say of 2:4: whether it pays, from which sizes, in which formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from compile_sparse.compiler.targets.target import SparsePattern

__all__ = ["LEAST_GAIN", "suggest"]

LEAST_GAIN = 1.03
"""Speed-up below which a layer is better left dense: its zeros cost accuracy."""
_SIZE = tuple[int, int]  # outer, inner


def suggest(rows: Sequence[Mapping[str, Any]], before: SparsePattern | None, setting: str) -> dict[str, Any] | None:
    """A ``sparse_patterns`` entry for ``2:4``, as plain data that ``SparsePattern`` accepts; None when nothing was measured.

    A size pays in a format when its 2:4 form is at least 1.03 times as fast as the dense form of that format, with the whole
    interval above 1, for one number of rows, and slower, with the whole interval below 1, for none. ``min_in_features`` and
    ``min_out_features`` are the smallest sizes such that every measured size from them on pays, in each of the formats named;
    where several pairs do that, those that hold most sizes.

    Args:
        rows: of the table, see ``probe``.
        before: what the target says now; multiples, int8 outputs and the alternative are taken from it.
        setting: device, versions and date, for ``measured``.
    """
    gains = _gains(rows)
    if not gains:
        return None
    regions = {format: region for format, sizes in gains.items() if (region := _region(sizes)) is not None}
    found: dict[str, Any] = {
        "pattern": "2:4",
        "pays": bool(regions),
        "why": "sparse kernels of cuSPARSELt were faster than the dense ones, on this model's GEMMs"
        if regions
        else "no sparse kernel of cuSPARSELt was faster than the dense one, on this model's GEMMs",
        "measured": f"{_ranges(gains)}; GEMMs alone, through torch, not TensorRT; {setting}",
    }
    if before is not None:
        kept = ("in_features_multiple", "out_features_multiple", "int8_outputs")
        found |= {key: getattr(before, key) for key in kept}
    if regions:
        # One pair for all formats: where every one of them pays.
        found |= {
            "min_out_features": max(outer for outer, _ in regions.values()),
            "min_in_features": max(inner for _, inner in regions.values()),
            "formats": sorted(regions),
        }
    else:
        found["instead"] = (before.instead if before else "") or "--prune channels=FRACTION"
    return found


def _gains(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[_SIZE, list[Mapping[str, Any]]]]:
    """Format -> size -> speed-ups over the dense form of that format, one for each number of rows."""
    found: dict[str, dict[_SIZE, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["pattern"] == "2:4" and row["over_twin"] is not None:
            sizes = found.setdefault(row["format"], {})
            sizes.setdefault((row["outer"], row["inner"]), []).append(row["over_twin"])
    return found


def _pays(gains: Iterable[Mapping[str, Any]]) -> bool:
    found = list(gains)
    gained = any(gain["value"] >= LEAST_GAIN and gain["ci95"][0] > 1 for gain in found)
    return gained and not any(gain["ci95"][1] < 1 for gain in found)


def _region(sizes: Mapping[_SIZE, Sequence[Mapping[str, Any]]]) -> _SIZE | None:
    """Smallest sizes from which all measured ones pay, or None."""
    paying = {size for size, gains in sizes.items() if _pays(gains)}
    best: tuple[int, int, int, int] | None = None
    for outer, inner in product({size[0] for size in sizes}, {size[1] for size in sizes}):
        inside = {size for size in sizes if size[0] >= outer and size[1] >= inner}
        if inside and inside <= paying:
            # Most sizes; then the smallest bounds that are sizes themselves.
            exact = -int(min(size[0] for size in inside) == outer and min(size[1] for size in inside) == inner)
            candidate = (-len(inside), exact, outer, inner)
            best = candidate if best is None else min(best, candidate)
    return None if best is None else (best[2], best[3])


def _ranges(gains: Mapping[str, Mapping[_SIZE, Sequence[Mapping[str, Any]]]]) -> str:
    parts = []
    for format, sizes in sorted(gains.items()):
        values = [gain["value"] for found in sizes.values() for gain in found]
        parts.append(f"{format} 2:4 {min(values):.2f}x to {max(values):.2f}x of dense {format} on {len(sizes)} sizes")
    return "; ".join(parts)
