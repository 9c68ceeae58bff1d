"""Building an artifact beside its final place, so that there is never half of one.

::

    .NAME.staging-KEY/          one per command; the same command finds it again and resumes
        lock                    held while a process builds here
        stages.json             stages that are complete, with the digests of the files they left
        content/                becomes NAME by one rename, after everything in it is durable
    .NAME.old-KEY               the artifact being replaced, between two renames

The manifest is written last inside ``content``, so whatever was killed at whatever point, ``NAME`` is the old artifact,
nothing, or the complete new one.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from compile_sparse.compiler.artifact.manifest import TOOL_NAME, FileEntry, Manifest
from compile_sparse.compiler.errors import EnvironmentFailure, ModelError, Refusal, UsageError
from compile_sparse.compiler.files.digests import folder_digests, list_files
from compile_sparse.compiler.files.durable import as_disk_failure, disk_errors, sync_folder, sync_tree, write_durably

__all__ = ["MANIFEST", "REPORT", "Staging", "recover_replaced"]

MANIFEST = "manifest.json"
REPORT = "report.json"
_STAGES = "stages.json"


def recover_replaced(out: Path) -> None:
    """Put the artifact back that a killed run had moved aside between its two renames; a live run is left alone."""
    moved = _siblings(out, "old")
    if moved and not out.exists() and not any(_locked(staging) for staging in _siblings(out, "staging")):
        os.rename(moved[-1], out)


def _siblings(out: Path, kind: str) -> list[Path]:
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"))


def _locked(staging: Path) -> bool:
    lock = FileLock(staging / "lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _is_artifact(folder: Path) -> bool:
    """A manifest of ours, and nothing beside what it lists: only then is deleting the folder no loss."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        present = set(list_files(folder))
    except (OSError, ValueError):
        return False
    return manifest.tool.name == TOOL_NAME and present <= {*manifest.files, MANIFEST}


class Staging:
    """Context manager for one build.

    ::

        with Staging(out, key=cache_key(inputs), force=force) as staging:
            lowered = staging.completed("lowered")
            if lowered is None:
                lowered = lower(staging.fresh("model"))
                staging.complete("lowered", lowered)
            staging.write("report.json", report)
            staging.publish(lambda files: Manifest(..., files=files))

    Leaving the block without ``publish`` (a failure, Ctrl-C, a kill) keeps the folder, so the same key resumes; a refusal before
    the first complete stage removes it.

    Args:
        out: final place; must not exist (an empty folder may) unless ``force``.
        key: hexadecimal digest of everything the result depends on.
        force: replace an existing artifact. Anything else at ``out`` is never deleted.

    Raises:
        UsageError: CS1020 when ``out`` is taken.
        EnvironmentFailure: CS5003 disk errors, also those raised inside the block; CS5004 another process builds the same.
    """

    def __init__(self, out: str | Path, *, key: str, force: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.force = force
        self._key = key[:16]
        self.root = self.out.parent / f".{self.out.name}.staging-{self._key}"
        self._old = self.out.parent / f".{self.out.name}.old-{self._key}"
        self._lock = FileLock(self.root / "lock")
        self._published = False

    @property
    def folder(self) -> Path:
        """What will become ``out``."""
        return self.root / "content"

    def __enter__(self) -> Self:
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._recover()
            self._check_out()
            self._acquire()
            self.folder.mkdir(exist_ok=True)
            self._remove_unrecorded()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A model that is refused would be refused again: there is nothing to resume.
        refused = isinstance(error, (ModelError, Refusal, UsageError)) and not self._stages()
        if self._published or refused:
            shutil.rmtree(self.root, ignore_errors=True)
        if self._published:
            self._remove_stale()
        self._lock.release()
        if isinstance(error, OSError) and (failure := as_disk_failure(error, self.out)):
            raise failure from error

    def fresh(self, name: str) -> Path:
        """An empty folder ``name`` inside the staging folder; what a stopped attempt left in it is removed."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def write(self, name: str, data: str | bytes) -> Path:
        """Write a small file durably."""
        path = self.folder / name
        # The temporary file lies outside 'content': what a kill leaves of it must not become part of the artifact.
        write_durably(path, data.encode() if isinstance(data, str) else data, temporary=self.root / "writing")
        return path

    def complete(self, stage: str, data: Mapping[str, Any] | None = None) -> None:
        """Record that ``stage`` is done, with what later stages need from it (plain JSON data)."""
        sync_tree(self.folder)
        stages = self._stages()
        stages[stage] = {"data": dict(data or {}), "files": folder_digests(self.folder)}
        write_durably(self.root / _STAGES, json.dumps(stages).encode())

    def completed(self, stage: str) -> dict[str, Any] | None:
        """Data of a stage that an earlier, stopped run completed; None when it must be done.

        The files it left are compared with their digests.
        """
        record = self._stages().get(stage)
        if record is None:
            return None
        files = {name: (digest, size) for name, (digest, size) in record["files"].items()}
        try:
            present = list_files(self.folder)
            found = folder_digests(self.folder, without=set(present) - set(files))
        except (OSError, ValueError):
            return None
        data: dict[str, Any] = record["data"]
        return data if found == files else None

    def publish(
        self, manifest: Callable[[dict[str, FileEntry]], Manifest], *, known: Mapping[str, str] | None = None
    ) -> Path:
        """Digest all files, write the manifest, make everything durable and move it to ``out``.

        Args:
            manifest: makes the manifest from the entry of every file.
            known: digests that this process computed while writing, by path inside the artifact.
        """
        with disk_errors(self.out):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            digests = folder_digests(self.folder, known=known)
            entries = {name: FileEntry(sha256=digest, bytes=size) for name, (digest, size) in digests.items()}
            sync_tree(self.folder)
            text = json.dumps(manifest(entries).model_dump(mode="json"), indent=2, ensure_ascii=False)
            self.write(MANIFEST, text + "\n")
            self._check_out()
            if self.out.exists() and any(self.out.iterdir()):
                shutil.rmtree(self._old, ignore_errors=True)
                os.rename(self.out, self._old)
            os.rename(self.folder, self.out)
            sync_folder(self.out.parent)
            self._published = True
            shutil.rmtree(self._old, ignore_errors=True)
        return self.out

    def _stages(self) -> dict[str, Any]:
        try:
            found = json.loads((self.root / _STAGES).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remove_unrecorded(self) -> None:
        """Remove what a stopped run wrote after its last complete stage: nobody knows whether it is whole."""
        recorded = {name for record in self._stages().values() for name in record["files"]}
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = Path(parent, name)
                if path.relative_to(self.folder).as_posix() not in recorded:
                    path.unlink()

    def _recover(self) -> None:
        """Put an artifact back that a killed run had moved aside."""
        recover_replaced(self.out)
        for old in _siblings(self.out, "old"):
            shutil.rmtree(old, ignore_errors=True)

    def _remove_stale(self) -> None:
        """Remove what stopped commands with other options left behind, unless one of them is running."""
        for other in _siblings(self.out, "staging"):
            if other == self.root:
                continue
            if not _locked(other):
                shutil.rmtree(other, ignore_errors=True)

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        ours = self.out.is_dir() and not self.out.is_symlink()
        if ours and not any(self.out.iterdir()):
            return
        replaceable = ours and _is_artifact(self.out)
        if not (self.force and replaceable):
            raise UsageError(
                "CS1020",
                "The output folder exists.",
                where=str(self.out),
                why="It holds an artifact."
                if replaceable
                else "It is not an artifact, or holds files that are not part of one, so it is not replaced.",
                hint="Give --force to replace it, or another --out." if replaceable else "Give another --out.",
            )

    def _acquire(self) -> None:
        """Lock the staging folder. Another process may publish and remove it between creation and locking; then retry."""
        while True:
            self.root.mkdir(exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise EnvironmentFailure(
                    "CS5004",
                    "Another process is compiling to the same folder.",
                    where=str(self.out),
                    why=f"It holds {self.root.name}/lock.",
                    hint="Wait for it, or give another --out.",
                ) from None
            except FileNotFoundError:
                continue
            if (self.root / "lock").exists():
                return
            self._lock.release()
