"""Content-keyed cache for what is expensive and reproducible, such as the lowered dense baseline.

An entry is a folder named by the digest of its inputs' canonical JSON, so two models with the same name cannot share one. It
is built in a temporary folder and renamed into place under a lock; its files are compared with their digests on every read,
and an entry that differs is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.files.digests import folder_digests, folder_problem
from compile_sparse.compiler.files.durable import disk_errors, sync_folder, sync_tree, write_durably

__all__ = ["Cache", "cache_key"]

_RECORD = ".entry.json"


def cache_key(inputs: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of ``inputs``: sorted keys, no spaces, no NaN.

    Raises:
        TypeError, ValueError: something that JSON cannot express exactly.
    """
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class Cache:
    """A folder of entries, private to the user.

    Args:
        root: the folder; by default ``COMPILE_SPARSE_CACHE``, else the user's cache folder.

    Raises:
        EnvironmentFailure: CS5003 when the disk cannot be written, CS5005 when the folder belongs to somebody else.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        chosen = root or os.environ.get("COMPILE_SPARSE_CACHE") or platformdirs.user_cache_path("compile-sparse")
        self.root = Path(chosen)
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            _require_owner(self.root)
            self.root.chmod(0o700)

    def get_or_build(self, key: str, build: Callable[[Path], None]) -> Path:
        """Folder of entry ``key``; ``build`` fills an empty folder when there is no valid one.

        One process builds, others wait. An error in ``build`` leaves no entry.
        """
        entry = self.root / key
        with disk_errors(self.root), FileLock(self.root / f"{key}.lock"):
            if _valid(entry):
                return entry
            shutil.rmtree(entry, ignore_errors=True)
            for left in self.root.glob(f"{key}.building-*"):  # of a killed build; nobody else holds this key's lock
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=self.root))
            try:
                build(temporary)
                record = {"files": folder_digests(temporary)}
                write_durably(temporary / _RECORD, json.dumps(record).encode())
                sync_tree(temporary)
                os.rename(temporary, entry)
                sync_folder(self.root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return entry


def _valid(entry: Path) -> bool:
    try:
        record = json.loads((entry / _RECORD).read_bytes())
        recorded = {name: (str(digest), int(size)) for name, (digest, size) in record["files"].items()}
        return folder_problem(entry, recorded, without=(_RECORD,)) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_owner(root: Path) -> None:
    """Entries become model files that a runtime executes: nobody else may write them."""
    status = root.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode)):
        raise EnvironmentFailure(
            "CS5005",
            "The cache folder belongs to another user.",
            where=str(root),
            why=f"Its owner is {status.st_uid}, this process runs as {os.getuid()}.",
            hint="Set COMPILE_SPARSE_CACHE to a folder of your own.",
        )
