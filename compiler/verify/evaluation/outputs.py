"""Text models with heads of which nothing is known: how far their first output is from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compile_sparse.compiler.artifact.report import Slice
from compile_sparse.compiler.verify.agreement import finite
from compile_sparse.compiler.verify.evaluation.models import Models, Texts
from compile_sparse.compiler.verify.fidelity import cosine
from compile_sparse.compiler.verify.quality import loss_of_score

__all__ = ["TextOutputs"]


@dataclass(frozen=True)
class TextOutputs(Texts):
    """Texts. The loss is one over the mean cosine of what each gives, flattened: outputs of different texts differ in size."""

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        answers = [found for _, found in models.of_texts(self.texts)]
        if not all(finite(found.dense, found.compiled) for found in answers):
            return Slice(loss_of="cosine", samples=len(answers))
        alike = float(np.mean([cosine(found.dense[None], found.compiled[None])[0] for found in answers]))
        return Slice(loss=loss_of_score(1.0, alike), loss_of="cosine", mean_cosine=alike, samples=len(answers))
