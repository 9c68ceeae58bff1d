"""The worker's client against processes that hang, die, shout or lie: a typed error each time, and nobody left behind."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes import client as module
from compile_sparse.compiler.runtimes.client import PASSED_ON, Worker
from compile_sparse.compiler.runtimes.messages import Bandwidth, Runtime
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


def test_a_call_is_answered_with_its_own_reply() -> None:
    with Worker(command(ECHO)) as worker:
        assert worker.runtime == Runtime("fake")
        assert worker.call(Work(size=3))["size"] == 3
        group = pid_of(worker)
    assert gone(group)


def test_progress_and_stale_replies_are_not_taken_for_the_answer() -> None:
    script = """
def work(request):
    send({"id": request["id"] - 1, "ok": True, "result": {"stale": True}})
    send([1, 2])
    for done in (1, 2):
        send({"event": "progress", "done": done, "total": 2})
    answer(request, {"stale": False})
serve(work)
"""
    seen: list[tuple[int, int]] = []
    with Worker(command(script)) as worker:
        assert worker.call(Work(), on_progress=lambda done, total: seen.append((done, total))) == {"stale": False}
    assert seen == [(1, 2), (2, 2)]


def test_a_worker_that_hangs_is_stopped_with_its_last_words() -> None:
    script = "def work(request):\n    print('thinking', file=sys.stderr, flush=True)\n    time.sleep(600)\nserve(work)"
    start = time.monotonic()
    error, group = failure(script, timeout=0.5)
    assert time.monotonic() - start < 10
    assert error.code == "CS5203"
    assert "thinking" in error.why
    assert gone(group)


def test_a_worker_that_is_killed_names_the_signal() -> None:
    script = """
def work(request):
    print("loading", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
serve(work)
"""
    error, group = failure(script)
    assert error.code == "CS5202"
    assert "SIGKILL" in error.why
    assert "memory" in error.why
    assert "loading" in error.why
    assert gone(group)


def test_a_worker_that_crashes_shows_its_traceback() -> None:
    error, group = failure("def work(request):\n    raise RuntimeError('no such kernel')\nserve(work)")
    assert error.code == "CS5202"
    assert "exited with code 1" in error.why
    assert "RuntimeError: no such kernel" in error.why
    assert gone(group)


def test_garbage_is_quoted_and_its_author_stopped() -> None:
    error, group = failure("def work(request):\n    send('Segmentation fault' + '!' * 5000)\nserve(work)")
    assert error.code == "CS5202"
    assert "Segmentation fault" in error.why
    assert len(error.why) < 300
    assert gone(group)


def test_bytes_that_are_no_text_are_garbage_too() -> None:
    error, group = failure(
        "def work(request):\n    sys.stdout.buffer.write(bytes([255, 254, 10]))\n    sys.stdout.flush()\nserve(work)",
        timeout=2,
    )
    assert error.code == "CS5202"
    assert "garbage" in error.what
    assert gone(group)


@pytest.mark.parametrize(
    "reply",
    [
        '{"ok": True}',
        '{"ok": True, "result": [1]}',
        '{"ok": False}',
        '{"ok": False, "error": "it failed"}',
        '{"event": "progress"}',
        '{"event": "progress", "done": "a", "total": None}',
    ],
)
def test_a_reply_of_another_form_is_a_typed_error(reply: str) -> None:
    error, group = failure(f"def work(request):\n    send({{'id': request['id'], **{reply}}})\nserve(work)", timeout=2)
    assert error.code in ("CS5202", "CS5204")
    assert gone(group)


@pytest.mark.parametrize("result", [{}, {"bytes_per_s": "fast"}, {"bytes_per_s": None}, {"bytes_per_s": True}])
def test_a_result_of_another_shape_is_garbage(result: dict[str, object]) -> None:
    """It stops here: nobody behind the client asks again what it is."""
    with (
        Worker(command(f"serve(lambda request: answer(request, {result}))")) as worker,
        pytest.raises(EnvironmentFailure) as caught,
    ):
        worker.call(Bandwidth())
    assert caught.value.code == "CS5202"
    assert caught.value.where == "bandwidth"
    assert "'bytes_per_s' must be a number" in caught.value.why


def test_a_megabyte_of_stderr_neither_blocks_nor_floods() -> None:
    script = """
def work(request):
    sys.stderr.write("noise " * 200_000 + "the last words")
    sys.stderr.flush()
    if request.get("die"):
        sys.exit(9)
    answer(request, {})
serve(work)
"""
    with Worker(command(script)) as worker:
        assert worker.call(Work(), timeout=20) == {}
        with pytest.raises(EnvironmentFailure) as caught:
            worker.call(Work(die=True), timeout=20)
    assert "code 9" in caught.value.why
    assert "the last words" in caught.value.why
    assert len(caught.value.why) < 3000


def test_an_error_reply_is_passed_on_and_the_worker_lives() -> None:
    script = """
def work(request):
    error = {"type": "InvalidGraph", "message": "node 7 has no input"}
    send({"id": request["id"], "ok": False, "error": error})
serve(work)
"""
    with Worker(command(script)) as worker:
        for _ in range(2):
            with pytest.raises(EnvironmentFailure) as caught:
                worker.call(Work())
            assert caught.value.code == "CS5204"
            assert caught.value.where == "fake"
            assert caught.value.why == "InvalidGraph: node 7 has no input"


@pytest.mark.parametrize(
    ("script", "code", "part"),
    [
        ("hello['protocol'] = 99\n" + ECHO, "CS5201", "99"),
        ("del hello['protocol']\n" + ECHO, "CS5201", "None"),
        ("sys.exit('no module named onnxruntime')", "CS5202", "no module named onnxruntime"),
        ("print('Welcome!', flush=True)\n" + ECHO, "CS5202", "Welcome!"),
        ("hello = {'protocol': 1}\n" + ECHO, "CS5202", "protocol"),
    ],
)
def test_a_worker_that_starts_wrong_is_explained(script: str, code: str, part: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with (
        pytest.raises(EnvironmentFailure) as caught,
        Worker(command(f"open({str(note)!r}, 'w').write(str(os.getpid()))\n" + script)),
    ):
        raise AssertionError("it must not start")
    assert caught.value.code == code
    assert part in caught.value.why
    assert gone(int(note.read_text()))


def test_a_command_that_does_not_exist_is_explained() -> None:
    with pytest.raises(EnvironmentFailure) as caught, Worker(["/nowhere/python"]):
        raise AssertionError("it must not start")
    assert caught.value.code == "CS5201"
    assert caught.value.where == "/nowhere/python"


WITH_CHILD = """
import subprocess
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
"""


@pytest.mark.parametrize(
    "ending",
    [
        ECHO,
        "def work(request):\n    time.sleep(600)\nserve(work)",
        "def work(request):\n    os.kill(os.getpid(), signal.SIGKILL)\nserve(work)",
    ],
    ids=["orderly", "hanging", "killed"],
)
def test_what_the_worker_started_ends_with_it(ending: str) -> None:
    group = 0
    try:
        with Worker(command(WITH_CHILD + ending)) as worker:
            group = pid_of(worker)
            worker.call(Work(), timeout=0.5)
    except EnvironmentFailure:
        pass
    assert gone(group)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_error_of_ours_ends_the_worker_at_once(kind: type[BaseException]) -> None:
    group, start = 0, time.monotonic()
    with pytest.raises(kind), Worker(command("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ECHO)) as worker:
        group = pid_of(worker)
        raise kind
    assert gone(group)
    assert time.monotonic() - start < 10


def test_a_worker_that_ignores_shutdown_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHUTDOWN_SECONDS", 0.3)
    script = """
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "hello":
        answer(request, hello)
    else:
        time.sleep(600)
"""
    with Worker(command(script)) as worker:
        group = pid_of(worker)
    assert gone(group)


def test_secrets_of_the_environment_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "LD_PRELOAD_X"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with Worker(command("serve(lambda request: answer(request, dict(os.environ)))")) as worker:
        seen = worker.call(Work())
    # LC_CTYPE is set by Python itself where the locale is C.
    assert set(seen) - {"LC_CTYPE"} <= set(PASSED_ON)
    assert seen["OMP_NUM_THREADS"] == "3"
    assert "secret" not in seen.values()


def test_ctrl_c_of_the_terminal_does_not_reach_the_worker() -> None:
    with Worker(command(ECHO)) as worker:
        assert os.getpgid(pid_of(worker)) != os.getpgrp()
        assert os.getsid(pid_of(worker)) != os.getsid(0)


def test_timeouts_are_from_line_to_line() -> None:
    """Progress is a sign of life: a long operation that reports is not stopped."""
    script = """
def work(request):
    for done in range(4):
        time.sleep(0.4)
        send({"event": "progress", "done": done, "total": 4})
    answer(request, {})
serve(work)
"""
    with Worker(command(script)) as worker:
        assert worker.call(Work(), timeout=1.2) == {}


FILL = """
def fill():
    kept = bytearray(200 << 20)
    for page in range(0, len(kept), 4096):
        kept[page] = 1
    return kept
"""


@pytest.mark.parametrize(
    "script",
    [
        "def work(request):\n    kept = fill()\n    time.sleep(600)\nserve(work)",
        "def work(request):\n    kept = fill()\n    while True:\n        send({'event': 'progress', 'done': 1, 'total': 2})\n"
        "        time.sleep(0.05)\nserve(work)",
        "def work(request):\n    if os.fork() == 0:\n        kept = fill()\n    time.sleep(600)\nserve(work)",
    ],
    ids=["silent", "reporting", "its child"],
)
def test_a_worker_that_takes_too_much_memory_is_stopped(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_WORKER_GIB", "0.1")
    monkeypatch.setattr(module, "CHILDREN_SECONDS", 0.1)
    start = time.monotonic()
    error, group = failure(FILL + script, timeout=60)
    assert time.monotonic() - start < 30
    assert error.code == "CS5208"
    assert "0.1 GiB" in error.why
    assert "COMPILE_SPARSE_WORKER_GIB" in error.hint
    assert gone(group)


def test_files_a_worker_has_mapped_are_not_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights are mapped; the system drops those pages when memory is short."""
    monkeypatch.setenv("COMPILE_SPARSE_WORKER_GIB", "0.05")
    (tmp_path / "weights").write_bytes(bytes(200 << 20))
    script = f"""
import mmap
def work(request):
    with open({str(tmp_path / "weights")!r}, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(pages[page] for page in range(0, len(pages), 4096))
    time.sleep(1.2)
    answer(request, {{"total": total}})
serve(work)
"""
    with Worker(command(script)) as worker:
        assert worker.call(Work(), timeout=60) == {"total": 0}
        assert psutil.Process(pid_of(worker)).memory_info().rss > 0.05 * 2**30


def test_without_a_variable_the_limit_follows_the_machine_and_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("COMPILE_SPARSE_WORKER_GIB", raising=False)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "CONTAINER_LIMIT", limit)
    whole = int(0.95 * psutil.virtual_memory().total)
    assert module._memory_limit() == whole
    limit.write_text("max\n")
    assert module._memory_limit() == whole
    limit.write_text(f"{1 << 30}\n")
    assert module._memory_limit() == int(0.95 * (1 << 30))
    monkeypatch.setenv("COMPILE_SPARSE_WORKER_GIB", "2.5")
    assert module._memory_limit() == int(2.5 * (1 << 30))


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan"])
def test_a_limit_that_is_no_amount_is_refused_before_anything_starts(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_WORKER_GIB", text)
    with pytest.raises(EnvironmentFailure) as caught, Worker(["/nowhere/python"]):
        raise AssertionError("it must not start")
    assert caught.value.code == "CS5208"
    assert repr(text) in caught.value.why


LEAVES_A_CHILD = """
def work(request):
    if os.fork() == 0:
        time.sleep(600)  # like an engine's process: it holds the stdout of the worker open
    print("engine lost", file=sys.stderr, flush=True)
    os._exit(3)
"""


def test_the_end_of_a_worker_is_noticed_although_its_child_holds_the_pipe() -> None:
    start = time.monotonic()
    error, group = failure(LEAVES_A_CHILD + "serve(work)", timeout=60)
    assert time.monotonic() - start < 20
    assert error.code == "CS5202"
    assert "exited with code 3" in error.why
    assert "engine lost" in error.why
    assert gone(group)


def test_a_worker_that_ends_itself_after_shutdown_leaves_no_child() -> None:
    """As the vLLM worker does; its engine's processes would live on."""
    script = """
child = os.fork()
if child == 0:
    time.sleep(600)
serve(lambda request: answer(request, {"child": child}))
os._exit(0)
"""
    with Worker(command(script)) as worker:
        group, child = pid_of(worker), worker.call(Work())["child"]
        assert psutil.pid_exists(child)
    assert gone(group)


def test_the_last_answer_of_a_worker_that_ends_at_once_arrives() -> None:
    script = (
        "def work(request):\n    time.sleep(0.7)\n    answer(request, {'last': True})\n    os._exit(0)\nserve(work)"
    )
    with Worker(command(script)) as worker:
        assert worker.call(Work(), timeout=20) == {"last": True}


def test_a_worker_that_closes_its_output_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHUTDOWN_SECONDS", 0.3)
    error, group = failure("def work(request):\n    os.close(1)\n    time.sleep(600)\nserve(work)", timeout=60)
    assert error.code == "CS5202"
    assert "closed its output" in error.why
    assert gone(group)


@pytest.mark.parametrize(
    ("kind", "message", "shown", "hint"),
    [
        # What vLLM 0.32 says in each case (the first shortened).
        (
            "ValidationError",
            "The checkpoint has model type `strange` but Transformers does not recognize this architecture.",
            "`strange`",
            "config.json",
        ),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", "2.00 GiB", "smaller --workload"),
        ("ValueError", "No available memory for the cache blocks.", "cache blocks", "smaller --workload"),
        (
            "RuntimeError",
            "Engine core initialization failed. See root cause above.",
            "no kernel for head size 7",
            "config",
        ),
    ],
)
def test_what_a_runtime_reports_reaches_people(kind: str, message: str, shown: str, hint: str) -> None:
    script = f"""
def work(request):
    print("no kernel for head size 7", file=sys.stderr, flush=True)
    send({{"id": request["id"], "ok": False, "error": {{"type": {kind!r}, "message": {message!r}}}}})
serve(work)
"""
    error, _ = failure(script)
    assert error.code == "CS5204"
    assert error.why.startswith(f"{kind}: {message}")
    assert shown in error.why
    assert hint in error.hint


def test_a_message_that_lists_everything_is_cut() -> None:
    message = "Model architectures ['Strange'] are not supported. Supported: " + "SomeForCausalLM, " * 1000
    script = f"""
def work(request):
    send({{"id": request["id"], "ok": False, "error": {{"type": "ValueError", "message": {message!r}}}}})
serve(work)
"""
    error, _ = failure(script)
    assert "['Strange'] are not supported" in error.why
    assert len(error.why) < 1100


def test_what_chooses_a_gpu_is_passed_on_and_hub_settings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "set")
    with Worker(command("serve(lambda request: answer(request, dict(os.environ)))")) as worker:
        seen = worker.call(Work())
    assert {name for name, value in seen.items() if value == "set"} == {"CUDA_HOME", "NVIDIA_VISIBLE_DEVICES"}
