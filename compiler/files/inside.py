"""Whether a file of a model folder lies in it: a folder that came from somewhere else may hold links to anything here."""

from __future__ import annotations

from pathlib import Path

from compile_sparse.compiler.errors import ModelError

__all__ = ["is_inside", "require_inside"]


def is_inside(folder: Path, path: Path) -> bool:
    """Whether ``path``, its links followed, lies in ``folder``.

    A snapshot in the Hugging Face cache (``models--ORG--NAME/snapshots/COMMIT``) consists of links to the ``blobs`` of the same
    model; these are inside.
    """
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # links that go round in a circle
        return False
    allowed = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        allowed.append(root.parents[1] / "blobs")
    return any(real.is_relative_to(each) for each in allowed)


def require_inside(folder: Path, path: Path) -> Path:
    """``path``, when it lies in ``folder``.

    Raises:
        ModelError: CS2010 when its links lead out of the folder.
    """
    if not is_inside(folder, path):
        raise ModelError(
            "CS2010",
            f"{path.name} leads out of the model folder.",
            where=path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name,
            why="It is a link to a file outside; a folder that was downloaded could show any file of this machine that way.",
            hint="Put a copy of the file in its place.",
        )
    return path
