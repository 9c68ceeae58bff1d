"""What a model is for, by transformers' own lists of classes."""

from __future__ import annotations

from typing import Literal

__all__ = ["Task", "task_of"]

Task = Literal[
    "causal-lm", "masked-lm", "sequence-classification", "token-classification", "embedding", "vision", "audio", "other"
]
"""``embedding``: a text model without a head. ``vision`` and ``audio``: with or without one."""


def task_of(model_class: type) -> Task:
    """The task of a transformers class; ``other`` for text models with heads of another kind."""
    from transformers.models.auto import modeling_auto as auto

    lists: tuple[tuple[Task, str], ...] = (
        ("causal-lm", "CAUSAL_LM"),
        ("masked-lm", "MASKED_LM"),
        ("sequence-classification", "SEQUENCE_CLASSIFICATION"),
        ("token-classification", "TOKEN_CLASSIFICATION"),
    )
    for task, name in lists:
        if model_class.__name__ in _names(getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES")):
            return task
    main = getattr(model_class, "main_input_name", "")
    if main in ("pixel_values", "input_features"):
        return "vision" if main == "pixel_values" else "audio"
    headless = _names(auto.MODEL_MAPPING_NAMES) | _names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
    return "embedding" if model_class.__name__ in headless else "other"


def _names(mapping: dict[str, str | tuple[str, ...] | list[str]]) -> set[str]:
    found: set[str] = set()
    for value in mapping.values():
        found.update((value,) if isinstance(value, str) else value)
    return found
