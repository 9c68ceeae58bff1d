"""``config.json``: read as data, and, when transformers rejects it, the key that is to blame."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.files.inside import require_inside
from compile_sparse.compiler.files.json_object import read_object

__all__ = ["as_loaded", "read_config", "rejected", "rejections"]

_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Kernels the model was last run with: a choice of whoever runs it, not a property of the model."""


def rejections() -> tuple[type[Exception], ...]:
    """What configs and model classes raise on values they cannot use; none of it is a defect of ours."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
    return (*kinds, ImportError, MemoryError, StrictDataclassError)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder, as it is written.

    Raises:
        UsageError: CS1003 when it is missing or cannot be read.
        ModelError: CS2010 when it is a link out of the folder.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(
            "CS1003",
            "The model folder has no config.json.",
            where=path.name,
            why="A Hugging Face folder is recognised by its config.json.",
            hint="Point MODEL at the folder that save_pretrained wrote.",
        )
    require_inside(path, file)
    try:
        return read_object(file)
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(
            "CS1003", "config.json cannot be read.", where=str(file.name), why=str(error), hint="Restore the file."
        ) from error


def as_loaded(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config class is given: floats that JSON lacks decoded (``{"__float__": "Infinity"}``), choices of kernels left out.

    Raises:
        ModelError: CS2014 for a value that no config can have.
    """
    from transformers import PreTrainedConfig

    for key, value in _numbers(raw):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _bad(key, where, f"{value} does not fit into 64 bits.")
    names = raw.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _bad("architectures", where, f"It is {json.dumps(names)[:80]}; a list of class names is expected.")
    decoded: dict[str, Any] = PreTrainedConfig._decode_special_floats(dict(raw))
    return {key: value for key, value in decoded.items() if key not in _IMPLEMENTATIONS}


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number, with the path of keys to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, (int, float)):
        yield path, value


def rejected(
    error: BaseException, where: str, raw: Mapping[str, Any] = {}, build: Callable[[dict[str, Any]], object] = dict
) -> ModelError:
    """The error of a config that transformers rejected with ``error``, naming the key where ``raw`` is given.

    Args:
        error: what was raised.
        where: the file.
        raw: the config as data.
        build: does again, with another config, what raised it.
    """
    keys = sorted(raw.keys() - {"model_type", "architectures"})
    others = [(key, {name: value for name, value in raw.items() if name != key}) for key in keys]
    # The class's default may fit the other values no better.
    others += [(key, {**raw, key: 1}) for key in keys if type(raw[key]) is int]
    for key, other in others:
        try:
            build(other)
        except rejections():
            continue
        return _bad(key, where, f"It is {json.dumps(raw[key], default=str)[:120]}. {_first_line(error)}")
    return _bad("", where, _first_line(error))


def _bad(key: str, where: str, why: str) -> ModelError:
    return ModelError(
        "CS2014",
        f"config.json has a value for {key!r} that the model cannot have."
        if key
        else "config.json has values that its model type rejects.",
        where=f"{where}, {key}" if key else where,
        why=why,
        hint="Compare it with a config of the same model_type, and its sizes with those of the checkpoint.",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
