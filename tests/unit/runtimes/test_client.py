"""A worker client: calls, replies, and what is said of workers that fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Bandwidth, Runtime
from tests.unit.runtimes.scripts import ECHO, Work, command, failure, gone, pid_of


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
