"""From hidden states to one embedding per text, as the model's own folder says (in the layout of sentence-transformers)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.errors import UsageError

__all__ = ["Pooling", "read_pooling"]

Array = NDArray[Any]

_MODES: Mapping[str, Callable[[Array], Array]] = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(axis=0),
    "mean_tokens": lambda states: states.mean(axis=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(axis=0) / np.sqrt(len(states)),
    "weightedmean_tokens": lambda states: np.average(states, axis=0, weights=np.arange(1, len(states) + 1)),
    "lasttoken": lambda states: states[-1],
}
"""Of the states ``[tokens, hidden]`` of one text without padding; several modes are joined in this order, as there."""
_SHORT = {name.removesuffix("_tokens").removesuffix("_token"): name for name in _MODES}
"""Newer folders name the modes in one string or list."""
_COMPUTED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Pooling:
    """How a text becomes a vector.

    Attributes:
        modes: of ``_MODES``.
        normalize: vectors are scaled to length 1.
        similarity: ``cosine`` or ``dot``.
        max_tokens: longest text, special tokens included, or None.
        assumed: what nothing in the folder says, as a sentence; empty when all is said.
    """

    modes: tuple[str, ...] = ("mean_tokens",)
    normalize: bool = False
    similarity: str = "cosine"
    max_tokens: int | None = None
    assumed: str = ""

    def embedding(self, states: Array) -> Array:
        """Vector ``[E]`` of one text's hidden states ``[tokens, hidden]``; of ``[hidden]`` (pooled by the model) the same."""
        wide = states.astype(np.float64)
        if wide.ndim == 2:
            wide = np.concatenate([run(wide) for name, run in _MODES.items() if name in self.modes])
        return unit(wide) if self.normalize or self.similarity == "cosine" else wide


def unit(vectors: Array) -> Array:
    """Vectors ``[..., E]`` scaled to length 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Array = vectors / np.where(norms == 0, 1.0, norms)
    return scaled


def read_pooling(folder: Path | None) -> Pooling:
    """What a model's folder says.

    Raises:
        UsageError: CS1056 when it says something that is not computed here, or nothing that can be read.
    """
    modules = _json(folder, "modules.json")
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules] if isinstance(modules, list) else []
    unknown = [kind for kind in kinds if kind not in _COMPUTED]
    if unknown:
        raise _not_computed("modules.json", f"It has a module {unknown[0]}; known are {', '.join(_COMPUTED)}.")
    place = next(
        (str(each.get("path")) for each, kind in zip(modules or (), kinds, strict=False) if kind == "Pooling"),
        "1_Pooling",
    )
    if not re.fullmatch(r"[\w-]+", place):
        raise _not_computed(
            "modules.json", f"{place!r} is no folder beside it."
        )  # nothing outside the model's folder is read
    said = _json(folder, f"{place}/config.json")
    sentence, settings = _json(folder, "sentence_bert_config.json"), _json(folder, "config_sentence_transformers.json")
    length = sentence.get("max_seq_length") if isinstance(sentence, dict) else None
    similarity = settings.get("similarity_fn_name") if isinstance(settings, dict) else None
    if similarity not in (None, "cosine", "dot"):
        raise _not_computed("config_sentence_transformers.json", f"Similarity {similarity!r} is not cosine or dot.")
    return Pooling(
        modes=_modes(said, place) if isinstance(said, dict) else ("mean_tokens",),
        normalize="Normalize" in kinds,
        similarity=similarity or "cosine",
        max_tokens=length if isinstance(length, int) and length > 0 else None,
        assumed=""
        if isinstance(said, dict)
        else "Embeddings are means over tokens: the model's folder has no pooling config (1_Pooling/config.json).",
    )


def _modes(said: Mapping[str, Any], place: str) -> tuple[str, ...]:
    prefix = "pooling_mode_"
    wanted = [key.removeprefix(prefix) for key, on in said.items() if key.startswith(prefix) and on is True]
    named = said.get("pooling_mode") or []
    wanted += [_SHORT.get(name, name) for name in ([named] if isinstance(named, str) else named)]
    unknown = [name for name in wanted if name not in _MODES]
    if unknown or not wanted:
        why = f"Pooling {unknown[0]!r} is not known." if unknown else "It switches no pooling on."
        raise _not_computed(f"{place}/config.json", f"{why} Known: {', '.join(_MODES)}.")
    return tuple(dict.fromkeys(wanted))


def _json(folder: Path | None, name: str) -> Any:
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _not_computed(name, f"It cannot be read: {error}") from error


def _not_computed(where: str, why: str) -> UsageError:
    return UsageError(
        "CS1056",
        "This model's embeddings cannot be computed.",
        where=where,
        why=why,
        hint="Leave the evaluation file out; agreement with the dense model is then measured on drawn inputs.",
    )
