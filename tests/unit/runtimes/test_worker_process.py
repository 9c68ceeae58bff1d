"""A worker is a process: it ends with what it started, takes no more memory than it may, and sees no secrets."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes import client as module
from compile_sparse.compiler.runtimes.client import PASSED_ON, Worker
from tests.unit.runtimes.scripts import ECHO, Work, command, failure, gone, pid_of

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


def test_what_chooses_a_gpu_is_passed_on_and_hub_settings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "set")
    with Worker(command("serve(lambda request: answer(request, dict(os.environ)))")) as worker:
        seen = worker.call(Work())
    assert {name for name, value in seen.items() if value == "set"} == {"CUDA_HOME", "NVIDIA_VISIBLE_DEVICES"}
