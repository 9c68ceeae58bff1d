"""``--help`` is instant: it imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "pydantic", "rich", "transformers", "yaml", "numpy", "onnxruntime")
_SCRIPT = """
import sys
from compile_sparse.compiler.cli.main import run
code = run(sys.argv[1:])
print("LOADED", *sorted(set(sys.argv_heavy) & set(sys.modules)))
sys.exit(code)
"""


def _loaded(*arguments):
    script = _SCRIPT.replace("sys.argv_heavy", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_imports_nothing_heavy():
    for arguments in (("--help",), ("targets", "show", "--help"), ("--version",)):
        assert _loaded(*arguments) == []


@pytest.mark.parametrize("command", ["compile", "explain", "verify"])
def test_options_of_backends_cost_pydantic_and_no_more(command):
    """They are pydantic models of each backend's own; targets, which their types name, are read with yaml."""
    assert set(_loaded(command, "--help")) <= {"pydantic", "yaml"}


def test_targets_need_no_torch():
    assert "torch" not in _loaded("targets")


def test_help_is_under_300_ms():
    """Processor time, best of five: a busy machine must not fail this, a heavy import (torch: over a second) must."""
    command = [sys.executable, "-m", "compile_sparse.compiler.cli.main", "--help"]
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.3
