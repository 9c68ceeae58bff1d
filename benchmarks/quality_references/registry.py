"""The list of reference methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["KINDS", "REFERENCES", "Reference", "Unavailable", "reference"]

KINDS = ("channels", "heads", "layers", "width", "low-rank")
Method = Callable[[Any, torch.Tensor], dict[str, Any] | None]
"""Changes a LlamaForCausalLM in place, given calibration windows ``[W, S]``; returns notes for the report."""


class Unavailable(Exception):
    """The method cannot run here; the message says why."""


@dataclass(frozen=True)
class Reference:
    """One row of the benchmark.

    Attributes:
        name, kind: of the row.
        source: the paper or package.
        run: the method.
    """

    name: str
    kind: str
    source: str
    run: Method


REFERENCES: dict[str, Reference] = {}


def reference(kind: str, name: str, source: str) -> Callable[[Method], Method]:
    """Register a method."""

    def register(method: Method) -> Method:
        if kind not in KINDS or name in REFERENCES:
            raise ValueError(f"row {name!r} of kind {kind!r} is unknown or registered twice")
        REFERENCES[name] = Reference(name, kind, source, method)
        return method

    return register
