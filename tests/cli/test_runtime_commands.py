"""``compile-sparse runtime``: options arrive, results are tables or JSON, help is instant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compile_sparse.compiler.runtimes import environments as runtimes
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes.environments import RuntimeRecord, RuntimeStatus

RECORD = RuntimeRecord(
    name="vllm",
    python=Path("/runtimes/[x]/bin/python"),
    managed=True,
    device="cpu",
    versions={"vllm": "1.2.3", "torch": "4.5.6"},
    facts={"isa": "avx512", "kernels": ["mm"]},
    checked_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def calls(monkeypatch):
    """The functions behind the commands only record what they are given."""
    made = []

    def install(name, **options):
        made.append((name, options))
        return RECORD

    def add(name, python, progress):
        made.append((name, {"python": python, "progress": progress}))
        return RECORD

    monkeypatch.setattr(runtime_install, "install_runtime", install)
    monkeypatch.setattr(runtime_install, "add_runtime", add)
    return made


def test_install_options_arrive(calls, shell):
    assert shell("runtime", "install", "vllm")[0] == 0
    assert shell("runtime", "install", "vllm", "--version", "1.0", "--device", "cuda", "--force")[0] == 0
    for _, options in calls:
        assert options.pop("progress") is not None
    assert calls == [
        ("vllm", {"version": None, "device": None, "force": False}),
        ("vllm", {"version": "1.0", "device": "cuda", "force": True}),
    ]


def test_add_options_arrive(calls, shell):
    assert shell("runtime", "add", "vllm", "--python", "p")[0] == 0
    ((name, options),) = calls
    assert (name, options["python"]) == ("vllm", "p")


@pytest.mark.parametrize("words", [("install", "vllm"), ("add", "vllm", "--python", "p")])
def test_the_record_is_shown(calls, shell, words):
    code, out, _ = shell("runtime", *words)
    assert code == 0
    for part in ("vllm 1.2.3", "torch 4.5.6", "cpu avx512", "/runtimes/[x]/bin/python", "managed", "yes"):
        assert part in out, part
    (found,) = json.loads(shell("runtime", *words, "--json")[1])
    assert (found["installed"], found["record"]) == (True, RECORD.model_dump(mode="json"))


def test_list(shell, monkeypatch):
    missing = RuntimeStatus("other", None, "Not installed.", "compile-sparse runtime install other")
    monkeypatch.setattr(runtimes, "list_runtimes", lambda: [missing, RuntimeStatus("vllm", RECORD)])
    for words in (("runtime",), ("runtime", "list")):
        code, out, _ = shell(*words)
        assert code == 0
        assert "Not installed." in out
        assert "install other" in out
        assert "vllm 1.2.3" in out
        found = json.loads(shell(*words, "--json")[1])
        assert [(entry["name"], entry["installed"]) for entry in found] == [("other", False), ("vllm", True)]
    assert [entry["name"] for entry in json.loads(shell("runtime", "list", "vllm", "--json")[1])] == ["vllm"]


@pytest.mark.parametrize("words", [("install", "vlm"), ("add", "vlm", "--python", sys.executable), ("list", "vlm")])
def test_unknown_runtimes_list_the_nearest(shell, words):
    code, out, err = shell("runtime", *words, "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "CS1051"
    assert "Did you mean vllm?" in err


def test_wrong_interpreters_are_refused(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))
    assert shell("runtime", "add", "vllm", "--python", str(tmp_path / "absent"))[0] == 2
    code, _, err = shell("runtime", "add", "vllm", "--python", sys.executable)
    assert code == 5
    assert "No module named 'vllm'" in err


@pytest.mark.parametrize("words", [("--help",), ("install", "--help"), ("add", "-h"), ("list", "-h")])
def test_help_imports_nothing_heavy(words):
    script = "import sys; from compile_sparse.compiler.cli.main import run; code = run(sys.argv[1:])\n"
    script += "print(*({'torch', 'pydantic', 'rich', 'filelock'} & set(sys.modules))); sys.exit(code)"
    command = [sys.executable, "-c", script, "runtime", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
