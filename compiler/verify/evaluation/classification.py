"""Classifiers and rerankers of text: how often they are right, and how often both models say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Score, Slice
from compile_sparse.compiler.verify.agreement import finite, logit_error
from compile_sparse.compiler.verify.evaluation.models import Models, Texts
from compile_sparse.compiler.verify.evaluation.scores import accuracy, auc, macro_f1, spearman, top_k
from compile_sparse.compiler.verify.quality import loss_of_score

__all__ = ["IGNORED", "LabelledText", "agreement_of_logits", "class_slice", "score_slice"]

Array = NDArray[Any]
IGNORED = -100
"""Label of a token that is not judged, as in torch."""


@dataclass(frozen=True)
class LabelledText(Texts):
    """Texts with or without labels, for models with logits.

    Attributes:
        texts: what is read.
        labels: one class per text; one class per token for token classifiers, ``IGNORED`` where there is none; one number per
            text for models with one logit; None without labels.
    """

    labels: tuple[Any, ...] | None

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        found = sorted(models.of_texts(self.texts), key=lambda each: each[0])
        dense, compiled = ([getattr(a, name) for _, a in found] for name in ("dense", "compiled"))
        if dense[0].ndim == 2:  # per token: those that stand for text
            keep = [~np.array(text.special) for text in self.texts]
            dense, compiled = ([e[k] for e, k in zip(each, keep, strict=True)] for each in (dense, compiled))
            labels = None
            if self.labels is not None:
                labels = np.concatenate([np.array(e)[k] for e, k in zip(self.labels, keep, strict=True)])
            before, after = np.concatenate(dense), np.concatenate(compiled)
        else:
            before, after = np.stack(dense), np.stack(compiled)
            labels = None if self.labels is None else np.array(self.labels)
        if not finite(before, after):
            return Slice(loss_of="agreement", samples=len(self.texts))
        if before.shape[-1] == 1:
            return score_slice(before[:, 0], after[:, 0], labels, samples=len(self.texts))
        return class_slice(before, after, labels, samples=len(self.texts))


def agreement_of_logits(dense: Array, compiled: Array, samples: int) -> Slice:
    """Without labels, of ``[N, C]``: the loss is one over the share of equal answers."""
    equal = float((dense.argmax(-1) == compiled.argmax(-1)).mean())
    return Slice(
        loss=loss_of_score(1.0, equal),
        loss_of="agreement",
        top1_agreement=equal,
        logit_error=logit_error(dense, compiled),
        samples=samples,
    )


def class_slice(dense: Array, compiled: Array, labels: Array | None, *, samples: int) -> Slice:
    """Of logits ``[N, C]`` and classes ``[N]``. The loss is that of accuracy.

    Where the dense model is right no more often than the commonest class is there, the labels are not what it was trained for, or
    too hard: they cannot show a loss, and agreement decides.
    """
    found = agreement_of_logits(dense, compiled, samples)
    if labels is None:
        return found
    judged = labels != IGNORED
    wanted, before, after = labels[judged], dense[judged], compiled[judged]
    measures: dict[str, Callable[[Array], float | None]] = {
        "accuracy": lambda logits: accuracy(wanted, logits.argmax(-1)),
        "accuracy@5": lambda logits: top_k(wanted, logits, 5) if logits.shape[-1] > 5 else None,
        "f1": lambda logits: macro_f1(wanted, logits.argmax(-1)),
        "auc": lambda logits: auc(wanted, _softmax(logits)),
    }
    scores = {}
    for name, measured in measures.items():
        a, b = measured(before), measured(after)
        if a is not None and b is not None:
            scores[name] = Score(baseline=a, compiled=b)
    right = scores["accuracy"]
    commonest = np.unique(wanted, return_counts=True)[1].max() / len(wanted)
    if right.baseline > commonest:
        loss = loss_of_score(right.baseline, right.compiled)
        return found.model_copy(update={"scores": scores, "loss": loss, "loss_of": "accuracy"})
    note = f"The dense model is right on {right.baseline:.1%}; always the commonest label is on {commonest:.1%}."
    return found.model_copy(update={"scores": scores, "note": f"{note} Agreement with it decides."})


def score_slice(dense: Array, compiled: Array, labels: Array | None, *, samples: int) -> Slice:
    """Of one logit ``[N]`` per text, as rerankers have, and numbers ``[N]``.

    Labels 0 and 1 are judged by AUC, others by the rank correlation; without labels the scores' own rank correlation with the
    dense model's decides.
    """
    alike = spearman(dense, compiled)
    found = Slice(
        loss=loss_of_score(1.0, alike),
        loss_of="rank_agreement",
        rank_agreement=alike,
        logit_error=logit_error(dense, compiled),
        samples=samples,
    )
    if labels is None:
        return found
    both = set(labels.tolist()) == {0, 1}
    name, chance = ("auc", 0.5) if both else ("rank_correlation", 0.0)
    pair = [auc(labels, each) if both else spearman(labels, each) for each in (dense, compiled)]
    before, after = (0.0 if each is None else each for each in pair)
    told = {"scores": {name: Score(baseline=before, compiled=after)}}
    if before > chance:
        return found.model_copy(update=told | {"loss": loss_of_score(before, after), "loss_of": name})
    note = f"The dense model's {name} is {before:.3f}, no better than chance. Rank agreement with it decides."
    return found.model_copy(update=told | {"note": note})


def _softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares: Array = wide / wide.sum(axis=-1, keepdims=True)
    return shares
