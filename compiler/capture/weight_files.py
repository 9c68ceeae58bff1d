"""Which files of a folder hold the model's weights: those that transformers' ``from_pretrained`` reads, in its order.

Source: ``transformers.modeling_utils._get_resolved_checkpoint_files``. The file that the config names (``transformers_weights``),
else ``model.safetensors``, else the shards of ``model.safetensors.index.json``. A single file wins over an index beside it, and
variants (``model.fp16.safetensors``) are read only by those who ask for them.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.files.inside import require_inside

__all__ = ["INDEX_NAME", "SINGLE_NAME", "damaged", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100 * 1024 * 1024
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz")


def weight_files(folder: Path, explicit: str = "", *, required: bool = True) -> list[Path]:
    """The safetensors files to read, shards by name.

    Args:
        folder: of the model.
        explicit: ``transformers_weights`` of the config.
        required: False: no weights is an answer (an empty list), not an error.

    Raises:
        ModelError: CS2003 no safetensors weights, or none under a name that transformers reads; CS2004 a bad index; CS2010 a link
            out of the folder.
    """
    if explicit:
        named = _named(folder, folder / "config.json", explicit)
        return _shards(folder, named) if explicit.endswith(".index.json") else [named]
    if (folder / SINGLE_NAME).is_file():
        return [require_inside(folder, folder / SINGLE_NAME)]
    if (folder / INDEX_NAME).is_file():
        return _shards(folder, require_inside(folder, folder / INDEX_NAME))
    if required:
        raise _none(folder)
    return []


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES} bytes")
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(mapping.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, f"The index is malformed: {error}.") from error
    return [_named(folder, index, name) for name in names]


def _named(folder: Path, by: Path, name: Any) -> Path:
    """The file that ``by`` names."""
    # What points elsewhere is hostile or broken; either way it is not followed.
    plain = isinstance(name, str) and PurePosixPath(name).name == name and name != ".."
    if not plain:
        raise damaged(by, f"It names a file outside the folder: {name!r}.")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise damaged(by, f"It names {name!r}, which is no safetensors file.")
    if not (folder / name).is_file():
        raise damaged(by, f"It names {name!r}, which is missing.")
    return require_inside(folder, folder / name)


def damaged(path: Path, why: str) -> ModelError:
    """The error of a file of weights, or one that names them, that is not what it should be."""
    return ModelError(
        "CS2004",
        "A weight file is damaged.",
        where=path.name,
        why=why,
        hint="Copy or download the checkpoint again; compare its size with the source.",
    )


def _none(folder: Path) -> ModelError:
    what, where = "This model has no safetensors weights.", folder.name
    if safetensors := _names(folder, ("*.safetensors",)):
        return ModelError(
            "CS2003",
            "No weight file has a name that is read.",
            where=where,
            why=f"transformers reads {SINGLE_NAME}, or the shards that {INDEX_NAME} names; the folder has "
            f"{', '.join(safetensors[:3])}.",
            hint=f"Rename the file to {SINGLE_NAME}, or put the index of its shards beside it.",
        )
    if pickles := _names(folder, _PICKLES):
        return ModelError(
            "CS2003",
            what,
            where=where,
            why=f"It has {', '.join(pickles[:3])}: pickle files run code when they are opened, so they are never read.",
            hint="Convert once in a place you trust: model.save_pretrained(FOLDER) of transformers writes safetensors.",
        )
    if others := _names(folder, _OTHERS):
        return ModelError(
            "CS2003",
            what,
            where=where,
            why=f"It has {', '.join(others[:3])}, which is another form of a model.",
            hint="Compile the folder that it was made from, with config.json and model.safetensors.",
        )
    return ModelError(
        "CS2003",
        what,
        where=where,
        why="The folder has a config.json but no *.safetensors file.",
        hint="Planning works without weights: 'compile-sparse explain'.",
    )


def _names(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))
