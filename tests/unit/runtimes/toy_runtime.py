"""A kind of runtime that is a tiny wheel in a local folder, which pip finds through its own configuration: no network."""

from __future__ import annotations

import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

from compile_sparse.compiler.runtimes.environments import (
    InstallPlan,
    Packages,
    RequirementsOf,
    RuntimeRecord,
)

CHECK = """
import importlib.metadata, json, sys
try:
    import toy, toydep
except ImportError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    sys.exit(1)
versions = {name: importlib.metadata.version(name) for name in ("toy", "toydep")}
print(json.dumps({"versions": versions, "device": "cpu", "isa": "avx2", "prefix": sys.prefix}))
"""
RECORD = RuntimeRecord(
    name="toy",
    python=Path(sys.executable),
    managed=False,
    device="cpu",
    versions={"toy": "1.0+cpu"},
    facts={"isa": "neon", "kernels": ["mm"]},
    checked_at="2026-01-01T00:00:00+00:00",
)


def wheel(folder, name, version="1.0", requires=(), code=""):
    """A wheel of one module."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    files = {
        f"{name}/__init__.py": "",
        f"{name}/__main__.py": code,
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", *metadata, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


class ToyRuntime:
    """Two steps, like vLLM on a processor: the package, then what it requires without what is not wanted."""

    name = "toy"
    check_script = Path()

    def default_device(self):
        return "cpu"

    def plan(self, device, version):
        version = version or "1.0"
        package = Packages("toy", (f"toy=={version}",), ("--no-deps",))
        return InstallPlan(version, (package, RequirementsOf("toy", without=("Not_Wanted",), torch_backend="cpu")))


REQUIRES = ("toydep>=1", "not-wanted", "absent; extra == 'all'", "absent; python_version < '3'")


class Recorder:
    """Progress that says what was opened; ``interrupt`` raises on the first advance, as Ctrl-C would."""

    def __init__(self, interrupt=False):
        self.labels, self.interrupt = [], interrupt

    @contextmanager
    def task(self, label, total=None):
        self.labels.append(label)
        yield self

    def advance(self, steps=1):
        if self.interrupt:
            raise KeyboardInterrupt
