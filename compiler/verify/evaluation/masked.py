"""Masked language models: how well hidden tokens are told from the rest of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Score, Slice
from compile_sparse.compiler.runtimes.messages import WindowScore
from compile_sparse.compiler.verify.evaluation.models import Encoded, Models, Texts
from compile_sparse.compiler.verify.quality import perplexity_slice

__all__ = ["MASKED_SHARE", "MaskedText", "hidden_places"]

MASKED_SHARE = 0.15
"""Of tokens that are not special, as in BERT (Devlin et al. 2018). All of them become the mask token: nothing else is drawn."""


@dataclass(frozen=True)
class MaskedText(Texts):
    """Windows of text. The loss is the ratio of perplexities of hidden tokens; both models see the same ones hidden.

    Attributes:
        texts: windows.
        mask: id of the mask token.
    """

    mask: int

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        places = list(hidden_places(self.texts, seed))
        hidden = [_hide(text, place, self.mask) for text, place in zip(self.texts, places, strict=True)]
        scores: list[WindowScore] = []
        right = np.zeros(2)
        # One window at a time: logits have the size of the vocabulary.
        for index, answers in models.of_texts(hidden, batch=1):
            place, ids = places[index], np.array(self.texts[index].ids)
            dense, compiled = (_log_softmax(each[place]) for each in (answers.dense, answers.compiled))
            wanted = ids[place]
            picked = np.arange(len(place))
            right += [(each.argmax(-1) == wanted).sum() for each in (dense, compiled)]
            scores.append(
                WindowScore(
                    tokens=len(place),
                    nll=-float(compiled[picked, wanted].sum()),
                    nll_against=-float(dense[picked, wanted].sum()),
                    top1_equal=int((dense.argmax(-1) == compiled.argmax(-1)).sum()),
                    kl=float((np.exp(dense) * (dense - compiled)).sum()),
                )
            )
        found = perplexity_slice(scores, seed)
        share = right / sum(score.tokens for score in scores)
        accuracy = Score(baseline=float(share[0]), compiled=float(share[1]))
        return found.model_copy(update={"scores": {"accuracy": accuracy}})


def hidden_places(texts: tuple[Encoded, ...], seed: int) -> Iterator[NDArray[np.intp]]:
    """Positions of each text that are hidden: ``MASKED_SHARE`` of those that are not special, at least one."""
    for index, text in enumerate(texts):
        free = np.flatnonzero(~np.array(text.special))
        draws = np.random.default_rng((seed, index))
        count = max(1, round(MASKED_SHARE * len(free)))
        yield np.sort(draws.choice(free, count, replace=False))


def _hide(text: Encoded, places: NDArray[np.intp], mask: int) -> Encoded:
    ids = list(text.ids)
    for place in places:
        ids[place] = mask
    return replace(text, ids=tuple(ids))


def _log_softmax(rows: NDArray[Any]) -> NDArray[np.float64]:
    wide: NDArray[np.float64] = rows.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
