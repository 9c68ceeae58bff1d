"""What other packages would have installed: objects registered under entry points for the length of a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from compile_sparse.compiler.extension import entry_points

__all__ = ["install"]


@dataclass(frozen=True)
class _Entry:
    name: str
    found: object

    @property
    def value(self) -> str:
        return f"third_party:{getattr(self.found, '__name__', self.found)}"

    def load(self) -> object:
        return self.found


def install(monkeypatch: pytest.MonkeyPatch, group: str, objects: Mapping[str, object], *, alone: bool = False) -> None:
    """Register ``objects`` by name in ``group``, beside what is installed or ``alone``."""
    found, wanted = entry_points.installed, group

    def installed(group: str) -> Mapping[str, object]:
        if group != wanted:
            return found(group)
        added = {name: _Entry(name, each) for name, each in objects.items()}
        return dict(sorted({**({} if alone else found(group)), **added}.items()))

    monkeypatch.setattr(entry_points, "installed", installed)
