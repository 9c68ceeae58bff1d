"""The folder of one model in a repository: files are placed in its version 1, and their digests kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from compile_sparse.compiler.capture.side_files import LABELS_FILE, find_side_files
from compile_sparse.compiler.files.digests import digest_file

__all__ = ["ModelFolder"]

_CONFIG, _VERSION = "config.pbtxt", "1"


class ModelFolder:
    """``OUT/NAME/``, new.

    Args:
        model: the lowered folder that files come from.
        out: the repository.
        name: of the model.
        known: digests of files of ``model``, computed when they were written; others are read.
    """

    def __init__(self, model: Path, out: Path, name: str, known: Mapping[str, str]) -> None:
        self.model, self.name, self.version = model, name, _VERSION
        self._root, self._known = out / name, known
        self.files: dict[str, str] = {}
        (self._root / _VERSION).mkdir(parents=True)

    def digest(self, source: str) -> str:
        """sha256 of a file of the lowered folder."""
        return self._known.get(source) or digest_file(self.model / source)[0]

    def place(self, source: str, name: str, *, link: bool = True) -> None:
        """Have a file of the lowered folder as ``1/name``; a hard link where allowed and possible, else a copy."""
        path = self._root / _VERSION / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked(self.model / source, path)):
            shutil.copyfile(self.model / source, path)
        self.files[f"{self.name}/{_VERSION}/{name}"] = self.digest(source)

    def place_side_files(self) -> None:
        """What a client needs to make inputs and to read outputs: tokenizer, processors, tokens that end a text, names of
        classes; and under which terms the model is used.
        """
        labels = [LABELS_FILE] if (self.model / LABELS_FILE).is_file() else []
        for name in [*(path.relative_to(self.model).as_posix() for path in find_side_files(self.model)), *labels]:
            self.place(name, name)

    def write(self, name: str, text: str) -> None:
        """A new file ``1/name``."""
        self._write(f"{_VERSION}/{name}", text)

    def write_config(self, text: str) -> None:
        """The model's configuration."""
        self._write(_CONFIG, text)

    def _write(self, name: str, text: str) -> None:
        data = text.encode()
        (self._root / name).write_bytes(data)
        self.files[f"{self.name}/{name}"] = hashlib.sha256(data).hexdigest()


def _linked(source: Path, place: Path) -> bool:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        return False
    return True
