"""Calibration: the same windows of tokens, or other inputs, for every pass that observes the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.executor import decoder_inputs
from compile_sparse.compiler.ir.program import Program

__all__ = ["CalibrationStream"]

SAMPLES_PER_BATCH = 8


@dataclass(frozen=True)
class CalibrationStream:
    """Windows of token ids, grouped into batches of equal length so that no batch needs padding; or samples of other inputs.

    Attributes:
        windows: token ids.
        tokens_per_batch: upper bound of batch size times length (one window always fits).
        arrays: for models that read no text: input name -> ``[samples, ...]``. There are no windows then.
    """

    windows: tuple[tuple[int, ...], ...]
    tokens_per_batch: int = 4096
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

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
        if self.arrays:
            return -(-len(next(iter(self.arrays.values()))) // SAMPLES_PER_BATCH)
        return len(self._batches())

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(map(len, self.windows))

    def spread(self, most: int) -> CalibrationStream:
        """At most ``most`` windows or samples of it, evenly spread."""
        count = len(next(iter(self.arrays.values()))) if self.arrays else len(self.windows)
        if count <= most:
            return self
        places = [place * count // most for place in range(most)]
        arrays = {name: value[places] for name, value in self.arrays.items()}
        return replace(
            self, windows=tuple(self.windows[place] for place in places) if self.windows else (), arrays=arrays
        )

    def feeds(self, program: Program) -> Iterator[dict[str, torch.Tensor]]:
        """Complete inputs of ``program`` (empty cache), one batch at a time, always in the same order.

        Raises:
            UsageError: CS1048, an input is missing among the arrays or has another shape there.
        """
        if self.arrays:
            yield from self._samples(program)
            return
        for batch in self._batches():
            yield decoder_inputs(program, torch.tensor(batch, dtype=torch.long))

    def _samples(self, program: Program) -> Iterator[dict[str, torch.Tensor]]:
        for entry in program.inputs:
            value = program.node(entry.placeholder).meta["val"]
            given = self.arrays.get(entry.name)
            wanted = [size if isinstance(size, int) else "any" for size in value.shape[1:]]
            if given is None or not _fits(given.shape[1:], wanted):
                raise UsageError(
                    "CS1048",
                    f"The calibration file has no {entry.name} that fits.",
                    where=entry.name,
                    why=f"The model takes [samples, {', '.join(map(str, wanted))}], the file has "
                    + (f"{list(given.shape)}." if given is not None else f"{', '.join(self.arrays)} only."),
                    hint="Preprocess the samples as for inference, and name the array after the input.",
                )
        count = len(next(iter(self.arrays.values())))
        for start in range(0, count, SAMPLES_PER_BATCH):
            yield {
                entry.name: torch.from_numpy(self.arrays[entry.name][start : start + SAMPLES_PER_BATCH]).to(
                    program.node(entry.placeholder).meta["val"].dtype
                )
                for entry in program.inputs
            }


def _fits(shape: tuple[int, ...], wanted: list[Any]) -> bool:
    return len(shape) == len(wanted) and all(want in ("any", size) for size, want in zip(shape, wanted, strict=True))
