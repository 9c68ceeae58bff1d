"""Deployments: what a serving system wants beside or around a lowered model. Entry-point group ``compile_sparse.deployments``.

A deployment adds a folder of its own name to an artifact, next to ``model/``. It changes nothing of the model and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension.entry_points import find_entry, load_entry
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.targets.target import Target

__all__ = ["Deployed", "Deployment", "find_deployment"]

_GROUP = "compile_sparse.deployments"


@dataclass(frozen=True)
class Deployed:
    """What a deployment wrote.

    Attributes:
        files: paths relative to its folder -> sha256 hex digest.
        limits: what whoever serves it must know, as sentences.
    """

    files: Mapping[str, str]
    limits: Sequence[str] = ()


class Deployment(Protocol):
    """One serving system. The entry is a class without constructor arguments, registered under ``name``."""

    name: str

    def refusals(self, kind: str, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """Why a model cannot be deployed so (errors, codes ``CS4...``), as far as it can be told before it is compiled.

        Args:
            kind: of the program: ``decoder``, ``text``, ``image``, ...
            target: compiled for.
            settings: what the run chose.
        """
        ...

    def write(
        self,
        model: Path,
        out: Path,
        *,
        name: str,
        target: Target,
        largest_batch: int,
        known: Mapping[str, str],
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Deployed:
        """Write into the empty folder ``out``, on the file system of ``model``: files may be hard links to its files.

        Args:
            model: the lowered folder, complete.
            out: where to.
            name: what the served model is called.
            target: compiled for.
            largest_batch: most requests or samples that are computed at once, where the model leaves it open.
            known: sha256 of the model's files, computed when they were written (``Lowered.files``); others are read.
            settings: what the run chose.

        Raises:
            Refusal: what was lowered cannot be deployed so.
            UsageError: ``name`` is no name for this system.
            EnvironmentFailure: a package is missing, or the disk failed.
        """
        ...


def find_deployment(name: str) -> Deployment:
    """An instance of the deployment called ``name``.

    Raises:
        UsageError: CS1061 when there is none, with the nearest name.
        EnvironmentFailure: CS5012 when the package that provides it cannot be imported.
    """

    def missing(why: str, hint: str) -> UsageError:
        return UsageError("CS1061", f"There is no deployment {name!r}.", where="--emit", why=why, hint=hint)

    made = load_entry(find_entry(_GROUP, name, missing), f"Deployment {name!r}", "CS5012")
    return cast(Deployment, made())
