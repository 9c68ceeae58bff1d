"""Reading an artifact folder. Nothing is trusted that the manifest does not list with its digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compile_sparse.compiler.artifact.manifest import Manifest
from compile_sparse.compiler.artifact.staging import MANIFEST, REPORT, Staging, recover_replaced
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.digests import folder_problem

__all__ = ["MANIFEST", "REPORT", "Artifact", "Staging", "read_artifact", "read_manifest", "replace_report"]

_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Artifact:
    """A complete artifact.

    Attributes:
        folder: where it is.
        manifest: validated.
        report: plain data of ``report.json``, or None when the artifact has none.
    """

    folder: Path
    manifest: Manifest
    report: Mapping[str, Any] | None

    @property
    def model(self) -> Path:
        """What the runtime loads."""
        return self.folder / "model"


def read_manifest(path: str | Path) -> Manifest:
    """What an artifact says of itself; its files are not looked at.

    Raises:
        UsageError: CS1021 not an artifact or incomplete, CS1022 a malformed manifest.
    """
    folder = Path(path)
    recover_replaced(folder)
    if not (folder / MANIFEST).exists():
        raise UsageError(
            "CS1021",
            "This is not a complete artifact.",
            where=str(folder),
            why=f"It has no {MANIFEST}." if folder.is_dir() else "There is no such folder.",
            hint="An interrupted compilation leaves no artifact; run the same command again to resume it.",
        )
    return _manifest(folder / MANIFEST)


def read_artifact(path: str | Path, *, verify_digests: bool = True, trusted: str = "") -> Artifact:
    """Open an artifact and check that it is complete and unchanged.

    Args:
        path: the folder.
        verify_digests: read every file and compare its sha256; otherwise names and sizes only.
        trusted: files of this suffix may be others than those recorded: the user vouches for them.

    Raises:
        UsageError: CS1021 not an artifact or incomplete, CS1022 a malformed manifest, CS1023 files differ from it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    recorded = {name: (entry.sha256, entry.bytes) for name, entry in manifest.files.items()}
    vouched = tuple(name for name in recorded if trusted and name.endswith(trusted))
    compared = {name: entry for name, entry in recorded.items() if name not in vouched}
    problem = folder_problem(folder, compared, contents=verify_digests, without=(MANIFEST, *vouched))
    if problem:
        raise UsageError(
            "CS1023",
            "The artifact is not what its manifest says.",
            where=str(folder),
            why=problem,
            hint="Compile it again, or copy it again from where it came from.",
        )
    report = _json(folder / REPORT) if REPORT in recorded else None
    return Artifact(folder, manifest, report)


def replace_report(artifact: Artifact, report: str, *, trusted: str = "") -> Artifact:
    """Give an artifact a new ``report.json`` (text) without a moment at which manifest and files disagree.

    The folder is rebuilt beside itself from hard links (copies where the file system has none) and swapped in. ``artifact``
    must have been read with ``verify_digests``: the digests of unchanged files are taken over, those of ``trusted`` ones read.
    """
    known = {
        name: entry.sha256
        for name, entry in artifact.manifest.files.items()
        if name != REPORT and not (trusted and name.endswith(trusted))
    }
    key = hashlib.sha256(report.encode()).hexdigest()
    with Staging(artifact.folder, key=key, force=True) as staging:
        shutil.rmtree(staging.folder)
        shutil.copytree(artifact.folder, staging.folder, copy_function=_link)
        (staging.folder / REPORT).unlink(missing_ok=True)
        staging.write(REPORT, report)
        staging.publish(lambda files: artifact.manifest.model_copy(update={"files": files}), known=known)
    return read_artifact(artifact.folder, verify_digests=False)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _json(path: Path) -> Any:
    why = ""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        why = "It is not a regular file."
    elif status.st_size > _MAX_JSON_BYTES:
        why = f"It is larger than {_MAX_JSON_BYTES:,} bytes."
    else:
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            why = f"It is not JSON: {error}."
    raise UsageError("CS1022", f"{path.name} is malformed.", where=str(path), why=why)


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            "CS1022", f"{path.name} is malformed.", where=str(path), why=f"{where or 'manifest'}: {first['msg']}."
        ) from error
