"""What the builder calls back: a log that is kept, and progress. Import after ``bindings.choose``."""

from __future__ import annotations

from typing import SupportsInt

from compile_sparse.backends.tensorrt.engine.bindings import trt
from compile_sparse.backends.tensorrt.engine.build_progress import BuildProgress

__all__ = ["Log", "Monitor"]

_MOST_LINES = 10_000
# Said of every build by a machine without a driver, and no error there.
_NO_DRIVER = "cudaError 35"


class Log(trt.ILogger):
    """Keeps warnings, errors and what is said of sparsity; each line starts with its severity as trtexec writes it: ``[W]``.

    Libraries keep the first logger of a process for all their objects, so there is one.

    Args:
        driverless: leave out what a machine without a GPU's driver causes.
    """

    def __init__(self, driverless: bool) -> None:
        trt.ILogger.__init__(self)  # the binding insists that it is called by name
        self.lines: list[str] = []
        self._driverless = driverless

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        worth_keeping = int(severity) <= int(trt.ILogger.Severity.WARNING) or "(Sparsity)" in msg
        if not worth_keeping or (self._driverless and _NO_DRIVER in msg) or len(self.lines) >= _MOST_LINES:
            return
        letter = "F" if severity == trt.ILogger.Severity.INTERNAL_ERROR else severity.name[0]
        self.lines.append(f"[{letter}] {msg}")


class Monitor(trt.IProgressMonitor):
    """Hands phases on, and stops a build that nobody waits for any more."""

    def __init__(self, progress: BuildProgress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        self._progress.start(phase_name, parent_phase, int(num_steps))

    def phase_finish(self, phase_name: str) -> None:
        # An exception would leave the builder's own threads, and end the process.
        try:
            self._progress.finish(phase_name)
        except OSError:
            return

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        try:
            self._progress.step(phase_name, int(step))
        except OSError:  # the compiler that asked is gone
            return False
        return True
