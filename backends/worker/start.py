"""Start a worker's module where it lies: ``python -P start.py MODULE [ARGUMENT ...]``.

The interpreter need not have compile-sparse. The packages above the module are opened without running their ``__init__``, so that
nothing is imported but what the module itself asks for: a worker's memory is its runtime's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["command", "main"]


def command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """Command line that runs ``main(arguments)`` of a module in an interpreter."""
    # -P keeps this folder's modules from shadowing the worker's imports.
    return [python, "-P", str(Path(__file__)), module, *arguments]


def main(arguments: Sequence[str]) -> int:
    """Run the module named first with the other arguments; the exit code of the process."""
    module, *others = arguments
    root, (package, *rooms, _) = Path(__file__).parents[2], module.split(".")
    for depth in range(len(rooms) + 1):
        opened = ModuleType(".".join([package, *rooms[:depth]]))
        opened.__path__ = [str(root.joinpath(*rooms[:depth]))]
        sys.modules[opened.__name__] = opened
    code: int = importlib.import_module(module).main(others)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
