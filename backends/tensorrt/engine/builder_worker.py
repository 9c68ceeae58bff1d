"""The building process: ``python -m`` this module and ``tensorrt`` or ``tensorrt_rtx``.

Builders crash, hang and take memory; this process may. It serves one build, so that its peak memory is that build's.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from compile_sparse.backends.tensorrt.engine.bindings import choose
from compile_sparse.backends.tensorrt.engine.build_messages import Build, BuildReply
from compile_sparse.backends.tensorrt.engine.build_progress import TOTAL
from compile_sparse.backends.worker.machine import resident_bytes
from compile_sparse.backends.worker.serve import serve
from compile_sparse.compiler.runtimes.messages import PROTOCOL, Greeting, Hello, Runtime
from compile_sparse.compiler.runtimes.wire import Report

__all__ = ["BuilderWorker"]


class BuilderWorker:
    """Answers with the bindings called ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def hello(self, request: Hello, report: Report) -> Greeting:
        """Who builds."""
        return Greeting(PROTOCOL, Runtime(self._name))

    def build(self, request: Build, report: Report) -> BuildReply:
        """See ``network_build.run_build``; here what goes wrong before and around it."""
        try:
            choose(self._name)
        except (ImportError, OSError) as error:
            return BuildReply([], "import", f"{type(error).__name__}: {error}")
        from compile_sparse.backends.tensorrt.engine.network_build import run_build

        try:
            built = run_build(request, lambda done: report(done, TOTAL))
        except OSError as error:
            return BuildReply([], "disk", str(error), errno=error.errno, file=str(error.filename))
        return replace(built, peak_rss_bytes=resident_bytes("VmHWM"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the name of the bindings")
    worker = BuilderWorker(sys.argv[1])
    sys.exit(serve([Hello.handled_by(worker.hello), Build.handled_by(worker.build)]))
