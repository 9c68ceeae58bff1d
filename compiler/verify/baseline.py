"""The dense model in the same runtime: built once per model, target and version, and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from compile_sparse.compiler.files.cache import Cache
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.verify.reference import write_reference

__all__ = ["baseline_parameters", "get_baseline"]

FACTS = "baseline.json"
FIDELITY_WINDOWS = 2


def get_baseline(
    key: str,
    program: Callable[[], Program],
    lower: Callable[[Program, Path], object],
    progress: Progress,
    *,
    text: Sequence[Sequence[int]],
    precision: str,
) -> Path:
    """Folder with ``model/``, a reference file and facts.

    Args:
        key: digest of everything the baseline depends on.
        program: the dense program; called only when the baseline must be built.
        lower: writes what the runtime loads into an empty folder.
        progress: where building it is reported.
        text: token ids it is checked on. The entry is kept: it must depend on the model alone, not on what a run evaluates.
        precision: the runtime computes in.
    """

    def build(folder: Path) -> None:
        dense = program()
        (folder / "model").mkdir()
        lower(dense, folder / "model")
        write_reference(
            dense, folder, text=text, precision=precision, seed=0, progress=progress, windows=FIDELITY_WINDOWS
        )
        facts = {"parameters": dense.parameter_count()}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    return Cache().get_or_build(key, build)


def baseline_parameters(folder: Path) -> int:
    """Parameters of the dense model of a baseline folder."""
    return int(json.loads((folder / FACTS).read_text(encoding="utf-8"))["parameters"])
