"""What a model says of generating text: which tokens begin and end it, and how tokens are drawn.

``generation_config.json`` says it, as transformers reads it; what that file leaves open stands in ``config.json``, where older
models have all of it. Several tokens may end a text, and then every one of them does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.inside import require_inside
from compile_sparse.compiler.files.json_object import read_object

__all__ = ["GENERATION_FILE", "GenerationDefaults", "generation_defaults"]

GENERATION_FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "min_length", "num_beams"),
)
"""Keys that older versions of transformers wrote into config.json when they were not the defaults."""


@dataclass(frozen=True)
class GenerationDefaults:
    """The defaults of a model.

    Attributes:
        values: under the names of ``generation_config.json``; ids of tokens are numbers or lists of numbers as they were written.
        added: keys that only the config has.
    """

    values: Mapping[str, Any]
    added: tuple[str, ...] = ()

    def ids(self, name: str) -> tuple[int, ...]:
        """Ids of one role: ``bos_token_id``, ``eos_token_id`` or ``pad_token_id``; none where nothing names one."""
        return _ids(self.values.get(name)) or ()


def generation_defaults(folder: Path | None, config: Mapping[str, Any]) -> GenerationDefaults:
    """Read them.

    Args:
        folder: of the model; None for one that has no files.
        config: as its class parsed it: used where the folder's own cannot be read.

    Raises:
        UsageError: CS1003 when ``generation_config.json`` is damaged, or has something else than numbers where numbers belong.
        ModelError: CS2010 when it is a link that leads out of the folder.
    """
    said = _read(folder, GENERATION_FILE) if folder is not None else {}
    for name in _IDS:
        if said.get(name) is not None and _ids(said[name]) is None:
            raise _malformed(f"{name} is {said[name]!r}; token ids are whole numbers.")
    for name in _SAMPLING:
        if not isinstance(said.get(name, 0), (int, float, NoneType)):
            raise _malformed(f"{name} is {said[name]!r}, which is no number.")
    # The classes of transformers take sampling options out of the config that they parse.
    written = dict(config) | (_read(folder, "config.json") if folder is not None else {})
    added = {}
    for name in (*_IDS, *_SAMPLING):
        value = written.get(name)
        usable = _ids(value) if name in _IDS else isinstance(value, (int, float))
        if usable and said.get(name) is None:
            added[name] = value
    return GenerationDefaults({**said, **added}, tuple(added))


def _ids(value: Any) -> tuple[int, ...] | None:
    """Ids of a value; negative ones, which some configs have for none, left out. None when it holds anything else."""
    found = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if any(type(each) is not int for each in found):
        return None
    return tuple(each for each in found if each >= 0)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = require_inside(folder, folder / name)
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (ValueError, RecursionError, OSError) as error:
        raise _malformed(str(error), name) from error


def _malformed(why: str, name: str = GENERATION_FILE) -> UsageError:
    return UsageError("CS1003", f"{name} cannot be read.", where=name, why=why, hint="Restore the file.")
