"""A worker whose two models are functions of the arrays they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.compiler.artifact.report import Slice
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Ran, Run
from compile_sparse.compiler.verify.evaluation.models import Encoded, EvaluationSlice, measure_evaluation
from compile_sparse.compiler.verify.performance import BASELINE

__all__ = ["FakeModels", "encoded", "measured"]

Function = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class FakeModels:
    """Remembers the feeds that were sent."""

    def __init__(self, dense: Function, compiled: Function) -> None:
        self.dense, self.compiled = dense, compiled
        self.feeds: list[dict[str, Any]] = []

    def call(self, request: Run, **_: Any) -> Ran:
        with np.load(Path(request.feeds)) as archive:
            feeds = {name: archive[name] for name in archive.files}
        self.feeds.append(feeds)
        found = (self.dense if request.name == BASELINE else self.compiled)(feeds)
        np.savez(request.outputs, **found)  # type: ignore[arg-type]
        return Ran(list(found))


def measured(
    slice_: EvaluationSlice,
    dense: Function,
    compiled: Function | None = None,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
) -> Slice:
    """Quality of ``compiled`` (the dense model itself when None) on ``slice_``."""
    worker: Any = FakeModels(dense, compiled or dense)
    return measure_evaluation(worker, {"x": slice_}, inputs, 0, SilentProgress(), 1.1).slices["x"]


def encoded(*ids: int) -> Encoded:
    """A text between the special tokens 1 and 2."""
    whole = (1, *ids, 2)
    return Encoded(whole, (0,) * len(whole), (True, *(False,) * len(ids), True))
