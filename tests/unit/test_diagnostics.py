"""Diagnostics: the four keys that reports have, and a severity that is said rather than read off the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from compile_sparse.compiler.diagnostics import Diagnostic

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("compiler", "passes", "backends") for path in (ROOT / folder).rglob("*.py"))


def test_reports_get_four_keys() -> None:
    said = Diagnostic("layer", "CS4301", "It is odd.", "Make it even.", severity="error")
    assert said.as_dict() == {"where": "layer", "code": "CS4301", "why": "It is odd.", "hint": "Make it even."}


def test_the_severity_is_not_read_off_the_code() -> None:
    assert Diagnostic("layer", "CS4301", "It is odd.").severity == "warning"


def refusals(path: Path) -> Iterator[tuple[int, str]]:
    """Line and severity of every diagnostic in a file whose code is a refusal's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Diagnostic":
            code = node.args[1] if len(node.args) > 1 else None
            if isinstance(code, ast.Constant) and str(code.value).startswith("CS4"):
                said = {each.arg: each.value for each in node.keywords}.get("severity")
                yield node.lineno, said.value if isinstance(said, ast.Constant) else "warning"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "Diagnostic(" in path.read_text(encoding="utf-8")], ids=str
)
def test_every_refusal_is_an_error(path: Path) -> None:
    """A refusal that is planned as a warning would only be met hours later, by the lowering."""
    assert not [line for line, severity in refusals(path) if severity != "error"]
