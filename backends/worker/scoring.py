"""From logits to what is told of them, in blocks of rows: a float32 copy of every position's vocabulary would be large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compile_sparse.backends.worker.model import Array, Tokens
from compile_sparse.compiler.runtimes.messages import TokenTrace, WindowScore

__all__ = ["ScoreSums", "extend_trace"]

ROWS = 64


def extend_trace(trace: TokenTrace, logits: Array, targets: Tokens) -> None:
    """Add positions to ``trace``: ``logits [S, V]``, the tokens that came ``[S]``."""
    for rows in _row_blocks(len(targets)):
        block, wanted = logits[rows], targets[rows]
        best_two = np.partition(block, -2, axis=-1)[:, -2:]
        trace.top1 += block.argmax(axis=-1).tolist()
        trace.margin += (best_two[:, 1] - best_two[:, 0]).astype(np.float64).tolist()
        trace.logprob += _log_softmax(block)[np.arange(len(wanted)), wanted].tolist()


class ScoreSums:
    """Sums over the positions of one window, kept in float64."""

    def __init__(self) -> None:
        self._nll = self._nll_against = self._kl = 0.0
        self._top1_equal = 0

    def add(self, logits: Array, against: Array, targets: Tokens) -> None:
        """Add positions: logits ``[S, V]`` of the model and of the one it is held against, the tokens that came ``[S]``."""
        for rows in _row_blocks(len(targets)):
            wanted = targets[rows]
            picked = np.arange(len(wanted))
            log_p, log_q = _log_softmax(logits[rows]), _log_softmax(against[rows])
            self._nll -= float(log_p[picked, wanted].sum(dtype=np.float64))
            self._nll_against -= float(log_q[picked, wanted].sum(dtype=np.float64))
            self._kl += float((np.exp(log_q) * (log_q - log_p)).sum(dtype=np.float64))
            self._top1_equal += int((logits[rows].argmax(-1) == against[rows].argmax(-1)).sum())

    def score(self, tokens: int) -> WindowScore:
        """What the window came to, of ``tokens`` positions."""
        return WindowScore(tokens, self._nll, self._nll_against, self._top1_equal, self._kl)


def _log_softmax(rows: Array) -> Array:
    shifted = rows.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    # Terms in float32 are exact enough; their sum over a large vocabulary is not.
    totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(totals).astype(np.float32)
    return shifted


def _row_blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))
