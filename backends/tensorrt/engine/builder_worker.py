"""The building process: ``python -m`` this module and ``tensorrt`` or ``tensorrt_rtx``.

Builders crash, hang and take memory; this process may. It serves one build, so that its peak memory is that build's.
"""

from __future__ import annotations

import sys
from typing import Any

from compile_sparse.backends.onnxruntime.worker import PROTOCOL, Report, RequestError, memory, serve
from compile_sparse.backends.tensorrt.engine.bindings import choose
from compile_sparse.backends.tensorrt.engine.build_progress import TOTAL

__all__ = ["BuilderWorker"]


class BuilderWorker:
    """Answers ``build`` with the bindings called ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def op_hello(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "runtime": {"name": self._name}}

    def op_build(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """See ``network_build.run_build``; also ``{"failure": "import", "why": ...}``, and ``{"failure": "disk", ...}``."""
        try:
            choose(self._name)
        except (ImportError, OSError) as error:
            return {"failure": "import", "why": f"{type(error).__name__}: {error}", "log": []}
        from compile_sparse.backends.tensorrt.engine.network_build import run_build

        try:
            built = run_build(request, lambda done: report(done, TOTAL))
        except OSError as error:
            return {"failure": "disk", "errno": error.errno, "file": str(error.filename), "why": str(error), "log": []}
        return {**built, "peak_rss_bytes": memory("VmHWM")}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise RequestError("give the name of the bindings")
    sys.exit(serve(BuilderWorker(sys.argv[1])))
