"""A folder that holds an adapter and not a model: recognised, and its base model found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture.hub import find_model
from compile_sparse.compiler.capture.weight_files import INDEX_NAME, SINGLE_NAME
from compile_sparse.compiler.errors import CompileSparseError, ModelError
from compile_sparse.compiler.files.inside import require_inside
from compile_sparse.compiler.files.json_object import read_object

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "base_of_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def base_of_adapter(folder: Path) -> Path | None:
    """The folder of the model that the adapter in ``folder`` changes; None when ``folder`` holds no adapter.

    Raises:
        ModelError: CS2015 when it cannot be found, the adapter is a pickle, or a whole model lies beside it.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    if (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file():
        raise _error(
            "The folder holds an adapter and a whole model.",
            f"transformers reads {SINGLE_NAME}, or with peft the adapter and its base; these may be two models.",
            "Take the adapter's files away, or the model's.",
        )
    settings = _settings(folder, file)
    base = str(settings.get("base_model_name_or_path") or "")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _error(
            f"This adapter (base model {base!r}) has no {ADAPTER_WEIGHTS}.",
            "Adapters in pickle files (adapter_model.bin) are never read: they run code when they are opened.",
            "Save it again with a recent peft.",
        )
    revision = settings.get("revision")
    asked = f"{base}@{revision}" if isinstance(revision, str) and revision and not Path(base).is_dir() else base
    try:
        found = find_model(asked) if base else None
    except CompileSparseError as error:
        raise _error(
            f"This is an adapter, and its base model {base!r} was not found.",
            error.why,
            "Put the base model there, fetch it into the hub's cache, or name its folder as base_model_name_or_path.",
        ) from error
    if found is None or found.resolve() == folder.resolve():
        raise _error(
            "This is an adapter that names no base model.",
            f"{ADAPTER_CONFIG} has no base_model_name_or_path that is another folder.",
            "Write the folder or hub id of the model it was trained on there.",
        )
    return found


def _settings(folder: Path, file: Path) -> dict[str, Any]:
    require_inside(folder, file)
    try:
        return read_object(file)
    except (ValueError, RecursionError) as error:
        raise _error(f"{ADAPTER_CONFIG} cannot be read.", str(error), "Restore the file.") from error


def _error(what: str, why: str, hint: str) -> ModelError:
    return ModelError("CS2015", what, where=ADAPTER_CONFIG, why=why, hint=hint)
