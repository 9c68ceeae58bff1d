"""Labels as people write them (names, class numbers, numbers), as the model's config counts them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.verify.evaluation.classification import IGNORED
from compile_sparse.compiler.verify.evaluation.lines import Line
from compile_sparse.compiler.verify.evaluation.models import Encoded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Labels"]


class Labels:
    """The classes of a model: ``num_labels`` and ``id2label`` of its config."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._count = int(config.num_labels)
        self._ids = {str(name): int(place) for place, name in (config.id2label or {}).items()}

    def of_texts(self, lines: list[Line]) -> tuple[Any, ...]:
        """One class per line, or one number where the model has one logit.

        Raises:
            UsageError: CS1058 a label that the model does not have.
        """
        if self._count == 1:
            return tuple(self._number(line) for line in lines)
        return tuple(self.class_of(line.label, line.where) for line in lines)

    def of_words(self, line: Line, text: Encoded) -> tuple[int, ...]:
        """One class per token: a word's first token has its label, everything else is not judged."""
        classes = [IGNORED if label == IGNORED else self.class_of(label, line.where) for label in line.label]
        found, before = [], None
        for word in text.words:
            found.append(IGNORED if word is None or word == before else classes[word])
            before = word
        return tuple(found)

    def class_of(self, label: Any, where: str) -> int:
        """The class that ``label`` means: a name of the config, or its number."""
        if isinstance(label, str) and label in self._ids:
            return self._ids[label]
        if isinstance(label, int) and 0 <= label < self._count:
            return int(label)
        names = ", ".join(list(self._ids)[:8])
        raise _unknown(
            where, f"{label!r} is none of the model's {self._count} classes: 0 to {self._count - 1}, or {names}."
        )

    def of_name(self, name: str, where: str) -> int:
        """The class that a folder's ``name`` means: a name of the config, or digits."""
        return self.class_of(int(name) if name not in self._ids and name.isdecimal() else name, where)

    def _number(self, line: Line) -> float:
        if isinstance(line.label, str) or not math.isfinite(line.label):
            raise _unknown(line.where, f"{line.label!r} is no number, and the model has one logit.")
        return float(line.label)


def _unknown(where: str, why: str) -> UsageError:
    return UsageError(
        "CS1058",
        "A label is none that the model has.",
        where=where,
        why=why,
        hint="Write labels as in id2label of the model's config.json.",
    )
