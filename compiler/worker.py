"""Talk to a runtime in its own process: JSON lines on stdin and stdout.

A runtime may crash, hang or take all memory; none of that may take the compiler with it. Requests carry an id, replies repeat
it; ``{"event": "progress"}`` lines may come in between. The worker's stderr is kept and its tail put into errors.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from compile_sparse.compiler.errors import EnvironmentFailure

__all__ = ["Worker"]

PROTOCOL = 1
SHUTDOWN_SECONDS = 5.0
STDERR_TAIL_BYTES = 2000
# The environment a runtime needs; tokens and the like stay out of a process that runs vendor code.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "TMPDIR",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


class Worker:
    """A worker process and its protocol.

    ::

        with Worker(backend.worker_command(target)) as worker:
            worker.call("load", name="compiled", folder=..., threads=2)

    Args:
        command: argument list.

    Raises:
        EnvironmentFailure: CS5201 it does not start or speaks another protocol; CS5202 it died; CS5203 it took too long;
            CS5204 it reported an error.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._next_id = 0
        self.runtime: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile()
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                encoding="utf-8",
                errors="replace",  # the reading thread must survive whatever a runtime prints
                env=environment,
                start_new_session=True,  # its own group, so that Ctrl-C reaches us and we stop it in order
            )
        except OSError as error:
            raise EnvironmentFailure(
                "CS5201", "The runtime's worker does not start.", where=self._command[0], why=str(error)
            ) from error
        threading.Thread(target=self._read, daemon=True).start()
        try:
            hello = self.call("hello", timeout=120)
        except BaseException:
            self._kill()
            raise
        runtime = hello.get("runtime")
        if hello.get("protocol") != PROTOCOL:
            self._kill()
            raise EnvironmentFailure(
                "CS5201",
                "The runtime's worker speaks another protocol.",
                where=self._command[-1],
                why=f"It says {hello.get('protocol')}, this version needs {PROTOCOL}.",
                hint="Reinstall compile-sparse in the runtime's environment.",
            )
        if not isinstance(runtime, dict):
            self._kill()
            raise _garbage("hello", json.dumps(hello))
        self.runtime = runtime
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with contextlib.suppress(EnvironmentFailure, subprocess.TimeoutExpired):
                self.call("shutdown", timeout=SHUTDOWN_SECONDS)
                if self._process is not None:
                    self._process.wait(timeout=SHUTDOWN_SECONDS)
        self._kill()

    def call(
        self,
        operation: str,
        *,
        timeout: float = 3600,
        on_progress: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Args:
            operation: name of the operation.
            timeout: seconds without any line from the worker after which it is stopped.
            on_progress: called with (done, total).
            arguments: plain JSON data.
        """
        self._next_id += 1
        request = {"id": self._next_id, "op": operation, **arguments}
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("the worker is not running")
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._died(operation) from None
        while True:
            reply = self._receive(operation, timeout)
            if reply.get("event") == "progress":
                done, total = reply.get("done"), reply.get("total")
                if not (isinstance(done, int) and isinstance(total, int)):
                    raise _garbage(operation, json.dumps(reply))
                if on_progress is not None:
                    on_progress(done, total)
            elif reply.get("id") == self._next_id:
                break
        if not reply.get("ok"):
            error = reply.get("error")
            if not isinstance(error, dict):
                error = {"message": error}
            raise EnvironmentFailure(
                "CS5204",
                f"The runtime failed in {operation!r}.",
                where=str(self.runtime.get("name", self._command[-1])),
                why=f"{error.get('type', 'Error')}: {error.get('message', 'no message')}",
                hint="If this is the artifact's fault, please report it with the model's config.json.",
            )
        result = reply.get("result")
        if not isinstance(result, dict):
            raise _garbage(operation, json.dumps(reply))
        return result

    def _receive(self, operation: str, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._kill()
            raise EnvironmentFailure(
                "CS5203",
                f"The runtime did not answer within {timeout:.0f} s.",
                where=operation,
                why=f"It was stopped. Its last output: {self._tail()}",
                hint="Use a smaller --workload, or fewer evaluation windows.",
            ) from None
        if line is None:
            raise self._died(operation)
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise _garbage(operation, line) from error
        return reply if isinstance(reply, dict) else {}

    def _read(self) -> None:
        process = self._process
        if process is not None and process.stdout is not None:
            for line in process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _died(self, operation: str) -> EnvironmentFailure:
        code = self._process.wait() if self._process else None
        if code is not None and code < 0:
            how = f"It was ended by {signal.Signals(-code).name}."
            if -code == signal.SIGKILL:
                how += " The system does this when memory runs out."
        else:
            how = f"It exited with code {code}."
        return EnvironmentFailure(
            "CS5202",
            f"The runtime's process died during {operation!r}.",
            where=str(self.runtime.get("name", self._command[-1])),
            why=f"{how} Its last output: {self._tail()}",
            hint="Check memory; 'compile-sparse doctor' shows whether the runtime itself works.",
        )

    def _tail(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - STDERR_TAIL_BYTES))
        return self._stderr.read().decode("utf-8", "replace").strip() or "none"

    def _kill(self) -> None:
        """End the worker and whatever it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _garbage(operation: str, line: str) -> EnvironmentFailure:
    return EnvironmentFailure("CS5202", "The runtime's worker sent garbage.", where=operation, why=line[:200])
