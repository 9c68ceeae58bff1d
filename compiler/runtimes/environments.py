"""Runtimes that live in their own interpreters: which kinds exist, and where each one is.

A serving runtime pins a torch that clashes with ours, so it has a virtual environment of its own and compile-sparse only
starts its Python. One JSON record per runtime says which Python that is and what a check found in it. Records are private to
the user, because what they name is executed; nothing of a model, recipe or artifact ever gets there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.files.durable import disk_errors, write_durably

__all__ = [
    "Device",
    "InstallPlan",
    "Packages",
    "RequirementsOf",
    "RuntimeKind",
    "RuntimeRecord",
    "RuntimeStatus",
    "find_kind",
    "find_runtime",
    "list_runtimes",
    "open_runtimes_folder",
    "runtimes_folder",
    "write_record",
]

_GROUP = "compile_sparse.runtimes"
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Packages:
    """A step: ``pip install`` with these options; ``label`` says what, to people."""

    label: str
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class RequirementsOf:
    """A step: install what an installed distribution requires (no extras).

    Attributes:
        distribution: its name.
        without: names of requirements left out.
        torch_backend: where pip sees no such build of torch, uv installs the same list with this ``--torch-backend``.
    """

    distribution: str
    without: tuple[str, ...] = ()
    torch_backend: str = ""


@dataclass(frozen=True)
class InstallPlan:
    """How to fill a fresh virtual environment: steps in order; repeating one that was interrupted must do no harm."""

    version: str
    steps: tuple[Packages | RequirementsOf, ...]


class RuntimeKind(Protocol):
    """Entry-point group ``compile_sparse.runtimes``; the entry is a class without constructor arguments, named like ``name``.

    Attributes:
        check_script: a file that imports only the standard library and the runtime. The runtime's Python runs it with ``-I``;
            it prints one JSON object: ``versions`` (package to version), ``device``, and any other facts, or ``error``.
    """

    name: str
    check_script: Path

    def default_device(self) -> Device:
        """What this machine has. Never raises."""
        ...

    def plan(self, device: Device, version: str | None) -> InstallPlan:
        """How to install ``version``, or the one that is known to work."""
        ...


class RuntimeRecord(BaseModel):
    """Where a runtime is and what the check found there. Facts age: the machine or the environment may have changed since."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(description="the runtime's kind")
    python: Path = Field(
        description="absolute path of its interpreter, links not resolved: in an environment it is one"
    )
    managed: bool = Field(description="whether 'runtime install' made the environment")
    device: Device = Field(description="what the runtime runs on")
    versions: Mapping[str, str] = Field(description="package -> version")
    facts: Mapping[str, Any] = Field(
        description="what else the check found: instruction set, kernels, architectures, ..."
    )
    checked_at: str = Field(description="time of the check, ISO 8601, UTC")

    @field_validator("python")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError("the path is not absolute")
        return value

    @property
    def problem(self) -> str:
        """Why the interpreter cannot be started, or an empty string."""
        return "" if os.access(self.python, os.X_OK) else f"Its Python is gone: {self.python}"


@dataclass(frozen=True)
class RuntimeStatus:
    """A known kind: its record, or why there is none, and what to do."""

    name: str
    record: RuntimeRecord | None
    why_not: str = ""
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        record = None if self.record is None else self.record.model_dump(mode="json")
        installed = record is not None and not self.why_not
        return {
            "name": self.name,
            "installed": installed,
            "why_not": self.why_not,
            "hint": self.hint,
            "record": record,
        }


def find_kind(name: str) -> RuntimeKind:
    """The kind called ``name``.

    Raises:
        UsageError: CS1051, with the nearest names.
    """
    entries = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if name in entries:
        return cast(RuntimeKind, entries[name].load()())
    near = difflib.get_close_matches(name, entries, n=3, cutoff=0.3)
    raise UsageError(
        "CS1051",
        f"There is no runtime {name!r}.",
        where="runtime",
        why=f"Known runtimes: {', '.join(sorted(entries)) or 'none'}.",
        hint=f"Did you mean {' or '.join(near)}?" if near else "See 'compile-sparse runtime list'.",
    )


def runtimes_folder() -> Path:
    """``COMPILE_SPARSE_RUNTIMES``, else ``runtimes`` in ``COMPILE_SPARSE_CACHE`` or in the user's cache folder."""
    if chosen := os.environ.get("COMPILE_SPARSE_RUNTIMES"):
        return Path(chosen).absolute()
    cache = os.environ.get("COMPILE_SPARSE_CACHE") or platformdirs.user_cache_path("compile-sparse")
    return Path(cache).absolute() / "runtimes"


def open_runtimes_folder() -> Path:
    """The folder, made if needed, for the user alone.

    Raises:
        EnvironmentFailure: CS5003 when the disk cannot be written, CS5005 when somebody else owns it, or may write to it.
    """
    folder = runtimes_folder()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder, empty_is_fine=True)
        folder.chmod(0o700)
    return folder


def find_runtime(name: str) -> RuntimeRecord | None:
    """The record of runtime ``name``, or None when it was neither installed nor added.

    Raises:
        EnvironmentFailure: CS5005 when others could have written the record, CS5207 when it is damaged.
    """
    path = runtimes_folder() / f"{name}.json"
    try:
        _require_private(path.parent)
        _require_private(path)
        record = RuntimeRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(name, path, f"It cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(name, path, f"{place}: {first['msg']}." if place else f"{first['msg']}.") from error
    if record.name != name:
        raise _damaged(name, path, f"It is the record of {record.name!r}.")
    return record


def write_record(record: RuntimeRecord) -> None:
    """Register ``record``, in place of what was there."""
    folder = open_runtimes_folder()
    with disk_errors(folder):
        write_durably(folder / f"{record.name}.json", record.model_dump_json(indent=2).encode())


def list_runtimes() -> list[RuntimeStatus]:
    """Every known kind, sorted, with its record or why there is none."""
    found = []
    for name in sorted({entry.name for entry in entry_points(group=_GROUP)}):
        install = f"compile-sparse runtime install {name}"
        try:
            record = find_runtime(name)
        except EnvironmentFailure as error:
            found.append(RuntimeStatus(name, None, f"{error.what} {error.why}", error.hint))
            continue
        why_not = "Not installed." if record is None else record.problem
        found.append(RuntimeStatus(name, record, why_not, install if why_not else ""))
    return found


def _damaged(name: str, path: Path, why: str) -> EnvironmentFailure:
    hint = f"'compile-sparse runtime install {name}' or 'runtime add' writes it anew."
    return EnvironmentFailure(
        "CS5207", f"The record of runtime {name!r} is damaged.", where=str(path), why=why, hint=hint
    )


def _require_private(path: Path, *, empty_is_fine: bool = False) -> None:
    """Only this user may have written here; in a folder that others may write to, anything may be theirs."""
    status = path.stat()
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        why = f"Its owner is {status.st_uid}, this process runs as {os.getuid()}."
    elif status.st_mode & 0o022 and not (empty_is_fine and path.is_dir() and not any(path.iterdir())):
        why = "Other users may write to it."
    else:
        return
    raise EnvironmentFailure(
        "CS5005",
        "The interpreters recorded here are not started: somebody else may have chosen them.",
        where=str(path),
        why=why,
        hint="Set COMPILE_SPARSE_RUNTIMES to a folder that only you can write to.",
    )
