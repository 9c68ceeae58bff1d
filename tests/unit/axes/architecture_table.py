"""The table architecture x kind: what may be removed, and what may not and why. ``make architectures`` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.residual.branches import find_branches
from compile_sparse.testing.models import MODELS, build_model

__all__ = ["COLUMNS", "TABLE", "architecture_table", "column_of"]

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"

COLUMNS = (
    "channels",
    "heads",
    "query heads",
    "head size q, k",
    "head size v",
    "width",
    "experts",
    "conv",
    "vocabulary, positions",
)
LAYERS = "layers"

_HEAD = """# What can be pruned

Made by `make architectures` from the tiny models of the tests, which have two layers; a test compares this file with what the
analysis finds, and another prunes every free axis and compares the result with the dense model. There is no code for any model:
the axes are found in the graph that `torch.export` makes.

`2 x 88` is two groups of 88 positions. A group is everything that must lose the same position together. `frozen` axes keep
their size; the number leads to the reason below.

- **channels**: inner positions of an MLP or of an expert. **experts**: whole experts, with their column of the router.
- **heads**: key-value heads with all their query heads. **query heads**: queries per key-value head, where several share one;
  another choice per key-value head is possible.
- **head size q, k**: positions that queries are compared on; rotated ones go in pairs, and layers that share a table of
  rotations share the choice. **head size v**: positions that are averaged.
- **width**: the residual stream. **conv**: channels that convolutions sum over or carry group by group. Positions of images and
  of kernels are never pruned, and left out here.
- **vocabulary, positions**: rows that ids or positions choose, and outputs with a name; only the reasons are listed.
- **layers**: residual branches that may be removed, by what is inside: whole blocks, or the attention or MLP of a block.

"""


def column_of(group: Group) -> str:
    """Column of a group, from its kind and roles."""
    if group.kind == "heads":
        return "query heads" if "broadcast" in group.roles else "heads"
    if group.kind == "head_dim":
        return "head size v" if "qk_dim" not in group.roles else "head size q, k"
    return group.kind if group.kind in COLUMNS else COLUMNS[-1]


def architecture_table(program_of: Callable[[str], Program]) -> str:
    """The page, for every model of ``compile_sparse.testing.models``."""
    reasons: dict[str, int] = {}
    where: dict[str, dict[str, None]] = {}
    rows: list[list[str]] = []
    for name in MODELS:
        cells: dict[str, Counter[tuple[int, str]]] = {}
        for group in analyse(program_of(name)).groups:
            if group.size == 1 or group.kind == "space":
                continue
            why = f"{group.frozen[0].reason[0].upper()}{group.frozen[0].reason[1:]}." if group.frozen else ""
            cells.setdefault(column_of(group), Counter())[(group.size, why)] += 1
            if why:
                reasons.setdefault(why, len(reasons) + 1)
                where.setdefault(why, {})[name] = None
        *others, last = (cells.get(column, Counter()) for column in COLUMNS)
        numbers = dict.fromkeys(f"({reasons[why]})" for _, why in last if why)
        rows.append(
            [
                name,
                *(_cell(found, reasons) for found in others),
                f"frozen {', '.join(numbers)}" if numbers else "",
                _branches(program_of(name)),
            ]
        )
    lines = [_row(["", *COLUMNS, LAYERS]), _row(["---"] * (len(COLUMNS) + 2)), *map(_row, rows)]
    lines += ["", "## Reasons", "", _row(["", "why it is frozen", "in"]), _row(["---"] * 3)]
    for why, number in reasons.items():
        models = "all" if len(where[why]) == len(MODELS) else ", ".join(where[why])
        lines.append(_row([str(number), why, models]))
    return _HEAD + "\n".join(lines) + "\n"


def _branches(program: Program) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(b.kind for b in find_branches(program)).items())


def _cell(found: Counter[tuple[int, str]], reasons: dict[str, int]) -> str:
    parts = []
    for (size, why), count in found.items():
        parts.append(f"{count} x {size}" + (f" frozen ({reasons[why]})" if why else ""))
    return ", ".join(parts)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    from compile_sparse.compiler.capture import capture_model

    Path(sys.argv[1]).write_text(architecture_table(lambda name: capture_model(build_model(name))), encoding="utf-8")
