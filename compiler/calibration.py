"""Calibration: the same windows of tokens for every pass that observes the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compile_sparse.compiler.execute import decoder_inputs
from compile_sparse.compiler.program import Program

__all__ = ["CalibrationStream"]


@dataclass(frozen=True)
class CalibrationStream:
    """Windows of token ids, grouped into batches of equal length so that no batch needs padding.

    Attributes:
        windows: token ids.
        tokens_per_batch: upper bound of batch size times length (one window always fits).
    """

    windows: tuple[tuple[int, ...], ...]
    tokens_per_batch: int = 4096

    def _batches(self) -> list[list[tuple[int, ...]]]:
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for window in self.windows:
            by_length.setdefault(len(window), []).append(window)
        batches = []
        for length, group in sorted(by_length.items()):
            size = max(1, self.tokens_per_batch // length)
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        return batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches())

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(map(len, self.windows))

    def feeds(self, program: Program) -> Iterator[dict[str, torch.Tensor]]:
        """Complete inputs of ``program`` (empty cache), one batch at a time, always in the same order."""
        for batch in self._batches():
            yield decoder_inputs(program, torch.tensor(batch, dtype=torch.long))
