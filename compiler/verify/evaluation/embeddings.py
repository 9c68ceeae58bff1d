"""Embedding models: the compiled vectors against the dense ones, and what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Score, Slice
from compile_sparse.compiler.verify.agreement import finite
from compile_sparse.compiler.verify.evaluation.models import Encoded, Models, Texts
from compile_sparse.compiler.verify.evaluation.pooling import Pooling, unit
from compile_sparse.compiler.verify.evaluation.scores import mrr, ndcg, recall, relevant_ranks, spearman
from compile_sparse.compiler.verify.quality import loss_of_score

__all__ = ["Pairs", "Sentences"]

Vectors = NDArray[np.float64]
CUTS = (1, 5, 10)
NDCG = 10


@dataclass(frozen=True)
class Sentences(Texts):
    """Texts to embed. The loss is one over the mean cosine to the dense embeddings."""

    pooling: Pooling

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        dense, compiled = embed(models, self.texts, self.pooling)
        return closeness(dense, compiled, note=self.pooling.assumed)


@dataclass(frozen=True)
class Pairs:
    """Queries and the documents that answer them, one of each per line. The loss is that of NDCG@10.

    A document that stands in several lines is one document; a query that does has several relevant ones. The corpus is all
    documents of the file.
    """

    queries: tuple[Encoded, ...]
    documents: tuple[Encoded, ...]
    pooling: Pooling

    @property
    def longest(self) -> int:
        return max(len(text.ids) for text in (*self.queries, *self.documents))

    @property
    def samples(self) -> int:
        return len(set(self.queries)) + len(set(self.documents))

    def measure(self, models: Models, *, seed: int) -> Slice:
        """See ``EvaluationSlice``."""
        queries, documents = list(dict.fromkeys(self.queries)), list(dict.fromkeys(self.documents))
        relevant = np.zeros((len(queries), len(documents)), bool)
        for query, document in zip(self.queries, self.documents, strict=True):
            relevant[queries.index(query), documents.index(document)] = True
        dense, compiled = embed(models, [*queries, *documents], self.pooling)
        found = closeness(dense, compiled, note=self.pooling.assumed)
        if found.mean_cosine is None:
            return found
        (q, d), (cq, cd) = (np.split(each, [len(queries)]) for each in (dense, compiled))
        before, after, mixed = (relevant_ranks(s, relevant) for s in (q @ d.T, cq @ cd.T, cq @ d.T))
        scores = {f"recall@{k}": (recall(before, k), recall(after, k)) for k in CUTS if k == 1 or k < len(documents)}
        scores |= {
            "mrr": (mrr(before), mrr(after)),
            f"ndcg@{NDCG}": (ndcg(before, NDCG), ndcg(after, NDCG)),
            # An index that was filled before the model was compiled, and is not filled again.
            "dense_index_recall@1": (recall(before, 1), recall(mixed, 1)),
        }
        return found.model_copy(
            update={
                "scores": {name: Score(baseline=a, compiled=b) for name, (a, b) in scores.items()},
                "loss": loss_of_score(*scores[f"ndcg@{NDCG}"]),
                "loss_of": f"ndcg@{NDCG}",
                "samples": len(self.queries),
            }
        )


def embed(models: Models, texts: Sequence[Encoded], pooling: Pooling) -> tuple[Vectors, Vectors]:
    """Embeddings ``[N, E]`` of the dense and of the compiled model."""
    found = [(index, pooling.embedding(a.dense), pooling.embedding(a.compiled)) for index, a in models.of_texts(texts)]
    found.sort(key=lambda each: each[0])
    return np.array([dense for _, dense, _ in found]), np.array([compiled for *_, compiled in found])


def closeness(dense: Vectors, compiled: Vectors, *, note: str = "") -> Slice:
    """Of embeddings ``[N, E]``: their mean cosine, and whether the same texts are like each other in both."""
    found = Slice(loss_of="cosine", samples=len(dense), note=note or None)
    if not finite(dense, compiled):
        return found
    a, b = unit(dense), unit(compiled)
    alike = float((a * b).sum(axis=1).mean())
    pairs = np.triu_indices(len(a), k=1)
    return found.model_copy(
        update={
            "loss": loss_of_score(1.0, alike),
            "mean_cosine": alike,
            "rank_agreement": spearman((a @ a.T)[pairs], (b @ b.T)[pairs]) if len(a) > 2 else None,
        }
    )
