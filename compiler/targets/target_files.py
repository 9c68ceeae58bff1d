"""Target files: YAML, of which one may extend another.

``extends: NAME`` starts from ``NAME.yaml``, of the same folder or of another one that is registered. Mappings are merged key by
key and ``sparse_patterns`` entry by entry; anything else replaces what is extended, and null takes a key out. A name is never
inherited. Files whose name starts with ``_`` are there to be extended and are no targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compile_sparse.compiler.errors import EnvironmentFailure

__all__ = ["TargetFile", "read_target_files"]

_ABSTRACT = "_"
_EXTENDS = "extends"


@dataclass(frozen=True)
class TargetFile:
    """One file with everything that it extends.

    Attributes:
        path: the file.
        provider: name of the entry point whose folder it is in.
        data: what the file says, merged onto what it extends.
    """

    path: Path
    provider: str
    data: Mapping[str, Any]

    def invalid(self, why: str) -> EnvironmentFailure:
        """The error (CS5001) for a file that says ``why`` it cannot be used."""
        return EnvironmentFailure(
            "CS5001",
            f"Target file {self.path.name} is not valid.",
            where=f"entry point {self.provider!r}",
            why=why,
            hint="Reinstall the package that provides it.",
        )


def read_target_files(folders: Iterable[tuple[str, Path]]) -> list[TargetFile]:
    """Every target's file in ``folders`` (name of the entry point, folder), merged; in order of folders and names.

    Raises:
        EnvironmentFailure: CS5001, a file that is no YAML mapping, extends one that is not there, or extends itself.
    """
    files = [_read(path, provider) for provider, folder in folders for path in sorted(folder.glob("*.yaml"))]
    return [
        TargetFile(file.path, file.provider, _resolved(file, files, ()))
        for file in files
        if not file.path.stem.startswith(_ABSTRACT)
    ]


def _read(path: Path, provider: str) -> TargetFile:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TargetFile(path, provider, {}).invalid(str(error)) from error
    file = TargetFile(path, provider, data if isinstance(data, Mapping) else {})
    if not isinstance(data, Mapping):
        raise file.invalid("It is no mapping of keys to values.")
    return file


def _resolved(file: TargetFile, files: Sequence[TargetFile], extending: tuple[TargetFile, ...]) -> dict[str, Any]:
    own = {key: value for key, value in file.data.items() if key != _EXTENDS}
    name = file.data.get(_EXTENDS)
    if name is None:
        return own
    chain = (*extending, file)
    # A file of its own folder comes first: another package's of the same name must not change a target.
    bases = sorted((f for f in files if f.path.stem == name), key=lambda f: f.path.parent != file.path.parent)
    if not bases:
        raise file.invalid(f"It extends {name!r}, which is none of: {', '.join(sorted(f.path.stem for f in files))}.")
    if bases[0] in chain:
        raise file.invalid(f"It extends itself: {' -> '.join(f.path.stem for f in (*chain, bases[0]))}.")
    base = _resolved(bases[0], files, chain)
    base.pop("name", None)  # two targets of one name would be one
    return _merged(base, own)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in own.items():
        if value is None:
            result.pop(key, None)
        elif key == "sparse_patterns" and isinstance(value, list) and key in base:
            result[key] = _merged_patterns(base[key], value)
        elif isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            result[key] = _merged(base[key], value)
        else:
            result[key] = value
    return result


def _merged_patterns(base: list[Any], own: list[Any]) -> list[Any]:
    """Entries of the same ``pattern`` are merged; others are added at the end."""
    by_name = {entry["pattern"]: entry for entry in base}
    for entry in own:
        by_name[entry["pattern"]] = _merged(by_name.get(entry["pattern"], {}), entry)
    return list(by_name.values())
