"""Workers made of a few lines of Python, and what the system says of their processes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.wire import Request

PROLOGUE = """
import json, os, signal, sys, time
def send(value):
    print(value if isinstance(value, str) else json.dumps(value), flush=True)
def answer(request, result):
    send({"id": request["id"], "ok": True, "result": result})
hello = {"protocol": 1, "runtime": {"name": "fake"}, "pid": os.getpid()}
def serve(work):
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "hello":
            answer(request, hello)
        elif request["op"] == "shutdown":
            answer(request, {})
            return
        else:
            work(request)
"""
ECHO = "serve(lambda request: answer(request, request))"


@dataclass(frozen=True)
class Work(Request[dict[str, object]], operation="work"):
    """Answered with any object."""

    die: bool = False
    size: int = 0


def command(script: str) -> list[str]:
    # -S and -I: nothing of the environment, and a fast start.
    return [sys.executable, "-I", "-S", "-c", PROLOGUE + script]


def alive(group: int) -> bool:
    """Whether any process of a group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def gone(group: int, seconds: float = 5.0) -> bool:
    """An ended grandchild disappears as soon as its new parent has collected it, a little after the kill."""
    end = time.monotonic() + seconds
    while alive(group) and time.monotonic() < end:
        # What is left may be zombies that nobody collects here; those hold no resources.
        states = [_state(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _group(entry) == group]
        if all(state == "Z" for state in states):
            return True
        time.sleep(0.02)
    return not alive(group)


def _fields(entry: Path) -> list[str]:
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0", "0"]


def _state(entry: Path) -> str:
    return _fields(entry)[0]


def _group(entry: Path) -> int:
    return int(_fields(entry)[2])


def pid_of(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def failure(script: str, timeout: float = 20) -> tuple[EnvironmentFailure, int]:
    """The error of one call to a worker running ``script``, and its process group."""
    group = 0
    with pytest.raises(EnvironmentFailure) as caught, Worker(command(script)) as worker:
        group = pid_of(worker)
        assert alive(group)
        worker.call(Work(), timeout=timeout)
    return caught.value, group
