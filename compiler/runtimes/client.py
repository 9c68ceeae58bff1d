"""Talk to a runtime in its own process: the typed requests and replies of ``wire``, on its stdin and stdout.

A runtime may crash, hang or take all memory; none of that may take the compiler with it. The worker's stderr is kept and its tail
put into errors.

``COMPILE_SPARSE_WORKER_GIB`` is how much memory a worker and its children may take; without it 95 % of what the machine (or the
control group of a container) has.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes.messages import PROTOCOL, Hello, Runtime, Shutdown
from compile_sparse.compiler.runtimes.wire import MalformedMessage, Request, to_line

__all__ = ["Worker"]

Reply = TypeVar("Reply")

SHUTDOWN_SECONDS = 5.0
STDERR_TAIL_BYTES = 2000
MESSAGE_CHARACTERS = 1000
"""Of an error a runtime reports: the reason comes first, then perhaps every architecture it knows."""
GIB = 2**30
MEMORY_VARIABLE = "COMPILE_SPARSE_WORKER_GIB"
MEMORY_SHARE = 0.95
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
POLL_SECONDS = 0.5
CHILDREN_SECONDS = 5.0
"""Finding children reads the process table, which takes milliseconds on a busy machine; looking at known ones does not."""
NO_MEMORY = re.compile(
    r"out of ?memory|MemoryError|not enough memory|no available memory|allocate memory", re.IGNORECASE
)
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
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
)


class _Memory:
    """How much memory a process and its descendants take, and whether that is too much.

    Counts what nothing but ending them gives back: pages of mapped files, weights for instance, are left out where the system
    tells them apart, because it drops them when memory is short.
    """

    def __init__(self, pid: int, limit: int) -> None:
        self._limit = limit
        self._root = psutil.Process(pid)
        self._children: list[psutil.Process] = []
        self._listed = self._looked = 0.0

    def excess(self) -> str:
        """What is wrong, as a sentence, or an empty string; looks at most once per ``POLL_SECONDS``."""
        now = time.monotonic()
        if now - self._looked < POLL_SECONDS:
            return ""
        self._looked = now
        if now - self._listed >= CHILDREN_SECONDS:
            self._listed = now
            with contextlib.suppress(psutil.Error):
                self._children = self._root.children(recursive=True)
        used = sum(map(_own_bytes, (self._root, *self._children)))
        if used <= self._limit:
            return ""
        return f"It took {used / GIB:.1f} GiB, its limit is {self._limit / GIB:.1f} GiB"


def _own_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0  # it ended
    return int(memory.rss) - int(getattr(memory, "shared", 0))


def _memory_limit() -> int:
    """Bytes a worker may take.

    Raises:
        EnvironmentFailure: CS5208 when ``COMPILE_SPARSE_WORKER_GIB`` is not a number above 0.
    """
    text = os.environ.get(MEMORY_VARIABLE, "")
    if text:
        try:
            chosen = float(text)
        except ValueError:
            chosen = 0.0
        if chosen > 0:
            return int(min(chosen, 2.0**30) * GIB)
        raise EnvironmentFailure(
            "CS5208",
            f"{MEMORY_VARIABLE} is no amount of memory.",
            where=MEMORY_VARIABLE,
            why=f"It is {text!r}; a number of GiB above 0 was expected.",
            hint="Unset it: the limit is then 95 % of the machine's memory.",
        )
    whole = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        whole = min(whole, int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    return int(MEMORY_SHARE * whole)


class Worker:
    """A worker process and its protocol.

    ::

        with Worker(backend.worker_command(target)) as worker:
            loaded = worker.call(Load(name="compiled", folder=..., threads=2))

    Args:
        command: argument list.

    Attributes:
        runtime: what answers; it says so when the process has started.

    Raises:
        EnvironmentFailure: CS5201 it does not start or speaks another protocol; CS5202 it died; CS5203 it took too long;
            CS5204 it reported an error; CS5208 it took too much memory.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._next_id = 0
        self.runtime = Runtime(self._command[-1])

    def __enter__(self) -> Self:
        limit = _memory_limit()
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
        self._memory = _Memory(self._process.pid, limit)
        threading.Thread(target=self._read, daemon=True).start()
        try:
            hello = self.call(Hello(), timeout=120)
        except BaseException:
            self._kill()
            raise
        if hello.protocol != PROTOCOL:
            self._kill()
            raise EnvironmentFailure(
                "CS5201",
                "The runtime's worker speaks another protocol.",
                where=self._command[-1],
                why=f"It says {hello.protocol}, this version needs {PROTOCOL}.",
                hint="Reinstall compile-sparse in the runtime's environment.",
            )
        if hello.runtime is None:
            self._kill()
            raise _garbage(Hello.operation, to_line(vars(hello)))
        self.runtime = hello.runtime
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with contextlib.suppress(EnvironmentFailure, subprocess.TimeoutExpired):
                self.call(Shutdown(), timeout=SHUTDOWN_SECONDS)
                if self._process is not None:
                    self._process.wait(timeout=SHUTDOWN_SECONDS)
        self._kill()

    def call(
        self,
        request: Request[Reply],
        *,
        timeout: float = 3600,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Reply:
        """Send a request and wait for its reply.

        Args:
            request: see ``messages``.
            timeout: seconds without any line from the worker after which it is stopped.
            on_progress: called with (done, total).
        """
        self._next_id += 1
        operation = request.operation
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("the worker is not running")
        try:
            process.stdin.write(to_line({"id": self._next_id, "op": operation, **vars(request)}) + "\n")
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
            raise self._failed(operation, f"{error.get('type', 'Error')}: {error.get('message', 'no message')}")
        try:
            return request.read_reply(reply.get("result"))
        except MalformedMessage as error:
            raise _garbage(operation, f"{error}: {json.dumps(reply)}") from error

    def _failed(self, operation: str, why: str) -> EnvironmentFailure:
        """The error of a reply that says ``why``."""
        hint = "If this is the artifact's fault, please report it with the model's config.json."
        if NO_MEMORY.search(why):
            hint = "Use a smaller --workload (shorter, or fewer requests at once), or a machine with more memory."
        cause_is_logged = re.search(r"\babove\b", why)
        if len(why) > MESSAGE_CHARACTERS:
            why = f"{why[:MESSAGE_CHARACTERS]} ..."
        if cause_is_logged:  # runtimes with processes of their own log the cause, and report that they did
            why += f" Its last output: {self._tail()}"
        return EnvironmentFailure(
            "CS5204",
            f"The runtime failed in {operation!r}.",
            where=self.runtime.name,
            why=why,
            hint=hint,
        )

    def _receive(self, operation: str, timeout: float) -> dict[str, object]:
        line = self._next_line(operation, timeout)
        if line is None:
            raise self._died(operation)
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise _garbage(operation, line) from error
        return reply if isinstance(reply, dict) else {}

    def _next_line(self, operation: str, timeout: float) -> str | None:
        """The next line, None after the last one; looks after the worker while waiting."""
        end, ended = time.monotonic() + timeout, False
        while True:
            if why := self._memory.excess():
                self._kill()
                raise EnvironmentFailure(
                    "CS5208",
                    f"The runtime took too much memory in {operation!r}.",
                    where=self.runtime.name,
                    why=f"{why}. It was stopped before the machine ran out.",
                    hint=f"Use a smaller --workload, or set {MEMORY_VARIABLE} to the GiB it may take.",
                )
            left = end - time.monotonic()
            try:
                return self._lines.get(timeout=min(POLL_SECONDS, max(0.0, left)))
            except queue.Empty:
                pass
            # Children that outlive it may hold its stdout open, so its end can go unnoticed there. Its last lines may still be
            # on their way; one more turn waits for them.
            if ended:
                return None
            ended = self._process is not None and self._process.poll() is not None
            if left <= 0 and not ended:
                break
        self._kill()
        raise EnvironmentFailure(
            "CS5203",
            f"The runtime did not answer within {timeout:.0f} s.",
            where=operation,
            why=f"It was stopped. Its last output: {self._tail()}",
            hint="Use a smaller --workload, or fewer evaluation windows.",
        )

    def _read(self) -> None:
        process = self._process
        if process is not None and process.stdout is not None:
            for line in process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _died(self, operation: str) -> EnvironmentFailure:
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=SHUTDOWN_SECONDS) if self._process else None
        if code is None:
            self._kill()
            how = "It closed its output and went on running, so it was stopped."
        elif code < 0:
            how = f"It was ended by {signal.Signals(-code).name}."
            if -code == signal.SIGKILL:
                how += " The system does this when memory runs out."
        else:
            how = f"It exited with code {code}."
        return EnvironmentFailure(
            "CS5202",
            f"The runtime's process died during {operation!r}.",
            where=self.runtime.name,
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
