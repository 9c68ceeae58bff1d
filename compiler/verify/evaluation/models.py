"""Both loaded models, called on the same inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Quality, Slice
from compile_sparse.compiler.progress import Progress, Task
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.verify.fidelity import run_samples
from compile_sparse.compiler.verify.performance import BASELINE, COMPILED
from compile_sparse.compiler.verify.quality import quality_of

__all__ = ["Answers", "Encoded", "EvaluationSlice", "Models", "Texts", "measure_evaluation"]

Array = NDArray[Any]
BATCH = 8


@dataclass(frozen=True)
class Encoded:
    """One text, or a pair of texts, as a model of text reads it.

    Attributes:
        ids: tokens, the special ones among them.
        types: segment of each.
        special: which ones stand for no text.
        words: the word each belongs to, None for special ones; where words were given.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    special: tuple[bool, ...]
    words: tuple[int | None, ...] = ()


class Answers(NamedTuple):
    """The output that counts (logits where there are any, else the first), of both models, and whether it is logits."""

    dense: Array
    compiled: Array
    logits: bool


class EvaluationSlice(Protocol):
    """What one evaluation file holds."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input; 0 where there are none."""
        ...

    @property
    def samples(self) -> int:
        """Inputs that both models will see."""
        ...

    def measure(self, models: Models, *, seed: int) -> Slice:
        """Quality of the compiled model against the dense one."""
        ...


@dataclass(frozen=True)
class Texts:
    """An evaluation file of texts that are read one by one: what its slices have in common."""

    texts: tuple[Encoded, ...]

    @property
    def longest(self) -> int:
        return max(len(text.ids) for text in self.texts)

    @property
    def samples(self) -> int:
        return len(self.texts)


class Models:
    """The dense and the compiled model in one runtime.

    Args:
        worker: with both loaded.
        inputs: names they take.
        scratch: folder for arrays that travel.
        task: advanced by samples.
    """

    def __init__(self, worker: Worker, inputs: Collection[str], scratch: Path, task: Task) -> None:
        self._worker, self._inputs, self._scratch, self._task = worker, inputs, scratch, task

    def answers(self, feeds: Mapping[str, Array]) -> Answers:
        """Of one call on ``feeds``, each ``[samples, ...]``."""
        found = [run_samples(self._worker, name, dict(feeds), self._scratch) for name in (BASELINE, COMPILED)]
        self._task.advance(len(next(iter(feeds.values()))))
        name = "logits" if "logits" in found[0] else next(iter(found[0]))
        return Answers(found[0][name], found[1][name], name == "logits")

    def of_samples(self, arrays: Mapping[str, Array]) -> Answers:
        """Of many samples, a few at a time; ``arrays`` have them in their first dimension."""
        count = len(next(iter(arrays.values())))
        parts = [
            self.answers({name: array[start : start + BATCH] for name, array in arrays.items()})
            for start in range(0, count, BATCH)
        ]
        dense, compiled = (np.concatenate(each) for each in zip(*((p.dense, p.compiled) for p in parts), strict=True))
        return Answers(dense, compiled, parts[0].logits)

    def of_texts(self, texts: Sequence[Encoded], batch: int = BATCH) -> Iterator[tuple[int, Answers]]:
        """Index of a text and the answers to it, in no particular order.

        Texts of one length run together and nothing is padded: padding is not the model's business, and ranges that are found at
        run time must not depend on it.
        """
        by_length: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            by_length.setdefault(len(text.ids), []).append(index)
        for length, indices in sorted(by_length.items()):
            for start in range(0, len(indices), batch):
                chosen = indices[start : start + batch]
                found = self.answers(self._feeds([texts[index] for index in chosen], length))
                for row, index in enumerate(chosen):
                    yield index, Answers(found.dense[row], found.compiled[row], found.logits)

    def _feeds(self, texts: Sequence[Encoded], length: int) -> dict[str, Array]:
        known = {
            "input_ids": np.array([text.ids for text in texts], np.int64),
            "attention_mask": np.ones((len(texts), length), np.int64),
            "token_type_ids": np.array([text.types for text in texts], np.int64),
        }
        return {name: known[name] for name in known if name in self._inputs}


def measure_evaluation(
    worker: Worker,
    slices: Mapping[str, EvaluationSlice],
    inputs: Collection[str],
    seed: int,
    progress: Progress,
    max_loss: float | None,
) -> Quality:
    """Quality on every slice.

    Args:
        worker: with both models loaded.
        slices: by name.
        inputs: names that the models take.
        seed: of what is drawn.
        progress: told of every sample.
        max_loss: see ``Quality``.
    """
    total = sum(each.samples for each in slices.values())
    with progress.task("quality", total=total) as task, tempfile.TemporaryDirectory() as scratch:
        models = Models(worker, inputs, Path(scratch), task)
        measured = {name: each.measure(models, seed=seed) for name, each in slices.items()}
    return quality_of(measured, max_loss)
