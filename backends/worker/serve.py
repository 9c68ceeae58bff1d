"""The serving loop: requests on stdin, replies on the original stdout; anything a library prints goes to stderr.

A malformed or failing request is answered and does not end the process. The form of the lines: ``runtimes.wire``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.compiler.runtimes.messages import Done, Shutdown
from compile_sparse.compiler.runtimes.wire import Handler, MalformedMessage, to_line

__all__ = ["serve"]

Send = Callable[[Mapping[str, object]], None]


def serve(handlers: Iterable[Handler]) -> int:
    """Answer requests until shutdown or end of input; the exit code of the process."""
    by_name = {handler.operation: handler for handler in handlers}
    stream = _protocol_stream()

    def send(message: Mapping[str, object]) -> None:
        stream.write(to_line(message) + "\n")
        stream.flush()

    for line in sys.stdin:
        if line.strip() and not _answer(by_name, line, send):
            break
    return 0


def _answer(handlers: Mapping[str, Handler], line: str, send: Send) -> bool:
    """Serve one line; False after a shutdown request."""
    identifier: object = None
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise RequestError("a request is a JSON object")
        identifier, operation = request.get("id"), request.get("op")
        if operation == Shutdown.operation:
            send({"id": identifier, "ok": True, "result": Done()})
            return False
        if not isinstance(operation, str) or operation not in handlers:
            known = ", ".join([*sorted(handlers), Shutdown.operation])
            raise RequestError(f"unknown operation {operation!r}; known: {known}")

        def report(done: int, total: int) -> None:
            send({"event": "progress", "id": identifier, "done": done, "total": total})

        send({"id": identifier, "ok": True, "result": handlers[operation].answer(request, report)})
    except Exception as error:  # noqa: BLE001  (the process boundary: every failure becomes an answer)
        kind = RequestError if isinstance(error, MalformedMessage) else type(error)
        send({"id": identifier, "ok": False, "error": {"type": kind.__name__, "message": str(error)}})
    return True


def _protocol_stream() -> TextIO:
    """The real stdout, kept for replies; file descriptor 1 then leads to stderr, so that no library can garble them."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return stream
