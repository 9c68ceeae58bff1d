"""Images and audio features, with or without labels: classifiers by accuracy, backbones by the cosine of their features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Slice
from compile_sparse.compiler.verify.agreement import agreement_slice, finite
from compile_sparse.compiler.verify.evaluation.classification import class_slice
from compile_sparse.compiler.verify.evaluation.models import Models

__all__ = ["LabelledArrays"]

Array = NDArray[Any]


@dataclass(frozen=True)
class LabelledArrays:
    """Preprocessed samples.

    Attributes:
        arrays: input name -> ``[N, ...]``.
        labels: classes ``[N]``, or None; only for models with logits.
    """

    arrays: Mapping[str, Array]
    labels: Array | None = None
    longest: int = 0

    @property
    def samples(self) -> int:
        return len(next(iter(self.arrays.values())))

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        found = models.of_samples(self.arrays)
        if found.logits and found.dense.ndim == 2 and finite(found.dense, found.compiled):
            return class_slice(found.dense, found.compiled, self.labels, samples=self.samples)
        return agreement_slice(found.dense, found.compiled, logits=False)
