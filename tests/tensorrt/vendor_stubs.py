"""Write type stubs of the installed TensorRT-RTX, which ships none: ``python -m tests.tensorrt.vendor_stubs FOLDER``.

mypy's own generator reads them off the compiled module. They are not committed, because they are the vendor's.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["repair", "write_stubs"]

MODULE = "tensorrt_rtx_bindings.tensorrt_rtx"
FUNCTION = re.compile(r"(\s*def \w+)\(self\b.*\)( -> .*: \.\.\.)")


def repair(text: str) -> str:
    """``text`` with functions that are no Python, such as one with a default before a parameter without, taking anything.

    Raises:
        SyntaxError: something else is no Python.
    """
    lines = text.splitlines()
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            line = (error.lineno or 1) - 1
            match = FUNCTION.fullmatch(lines[line])
            if match is None or "**kwargs" in lines[line]:
                raise
            lines[line] = f"{match[1]}(self, *args, **kwargs){match[2]}"
        else:
            return "\n".join(lines) + "\n"


def write_stubs(folder: Path) -> None:
    """Replace the stubs in ``folder``; takes a few seconds."""
    generator = [sys.executable, "-c", "from mypy.stubgen import main; main()"]  # compiled, so -m does not run it
    subprocess.run([*generator, "--quiet", "--inspect-mode", "--module", MODULE, "--output", str(folder)], check=True)
    package, name = MODULE.split(".")
    made = folder / package / f"{name}.pyi"
    made.write_text(repair(made.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / package / "__init__.pyi").write_text("", encoding="utf-8")
    # The package that people import has the same names and a version.
    public = folder / name / "__init__.pyi"
    public.parent.mkdir(exist_ok=True)
    public.write_text(f"from {MODULE} import *\n\n__version__: str\n", encoding="utf-8")


if __name__ == "__main__":
    write_stubs(Path(sys.argv[1]))
