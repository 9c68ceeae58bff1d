"""What people see when it goes wrong, and what pipelines get: message, JSON, exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from compile_sparse.compiler.errors import (
    EnvironmentFailure,
    GateFailure,
    Interrupted,
    ModelError,
    Refusal,
    UsageError,
)

COMPILE = ("M", "--target", "null")


@pytest.mark.parametrize(
    ("kind", "code"),
    [(UsageError, 2), (ModelError, 4), (Refusal, 4), (EnvironmentFailure, 5), (Interrupted, 130)],
)
def test_exit_codes_and_the_four_facts(api, shell, kind, code):
    api.raises = kind("CS0001", "It failed.", where="here", why="because", hint="do this")
    found, out, err = shell(*COMPILE)
    assert found == code
    assert out == ""
    for part in ("CS0001", "It failed.", "where: here", "why: because", "hint: do this"):
        assert part in err
    found, out, _ = shell(*COMPILE, "--json")
    assert found == code
    assert json.loads(out)["error"] == api.raises.as_dict()


def test_a_failed_gate_shows_the_table_and_the_path_first(api, shell):
    failure = GateFailure("CS3001", "A gate failed.", result=api.result)
    api.raises = failure
    code, out, err = shell(*COMPILE)
    assert code == 3
    assert "perplexity" in out
    assert out.splitlines()[-1] == "out/report.json"
    assert "CS3001" in err
    code, out, _ = shell(*COMPILE, "--json")
    assert code == 3
    assert json.loads(out) == api.result.report  # one document, not two
    assert shell("verify", "A")[0] == 3


def test_internal_errors_are_short_unless_debugging(api, shell):
    api.raises = ZeroDivisionError("oops")
    code, _, err = shell(*COMPILE)
    assert code == 1
    assert "CS9001" in err
    assert "ZeroDivisionError: oops" in err
    assert "--debug" in err
    assert "Traceback" not in err
    code, _, err = shell(*COMPILE, "--debug")
    assert code == 1
    assert "Traceback" in err


def test_ctrl_c(api, shell):
    api.raises = KeyboardInterrupt()
    code, _, err = shell(*COMPILE)
    assert code == 130
    assert "The same command resumes." in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("M",), "Missing option '--target'"),
        (("M", "--target", "null", "--prune", "channels"), "KIND=FRACTION"),
        (("M", "--target", "null", "--prune", "channels=half"), "'half' is not a number"),
        (("M", "--target", "null", "--prune", "channels=1.0"), "strictly between 0 and 1"),
        (("M", "--target", "null", "--prune", "channels=nan"), "strictly between 0 and 1"),
        (("M", "--target", "null", "--eval", "a=x", "--eval", "a=y"), "given twice"),
        (("M", "--target", "null", "--eval", "file.jsonl"), "SLICE=FILE"),
        (("M", "--target", "null", "--nonsense"), "No such option"),
        (("doctro",), "Did you mean 'doctor'?"),
        (("targets", "show", "ort-cpux"), "ort-cpu"),
        (("verify",), "Missing argument"),
    ],
)
def test_usage_errors_exit_2(api, shell, words, part):
    code, out, err = shell(*words)
    assert code == 2
    assert part in err
    assert out == ""
    assert not api.calls
    assert json.loads(shell(*words, "--json")[1])["error"]["exit_code"] == 2


def test_a_kind_given_twice_is_refused_with_the_arithmetic(api, shell):
    words = ("M", "--target", "null", "--prune", "channels=0.25", "--prune", "heads=0.5", "--prune", "channels=0.25")
    code, out, err = shell(*words)
    assert (code, out) == (4, "")
    for part in ("CS4105", "1 - 0.75 x 0.75 = 0.4375 in all, not 0.5", "fraction 0.4375, or 0.5"):
        assert part in err
    assert not api.calls
    assert json.loads(shell(*words, "--json")[1])["error"]["exit_code"] == 4


def test_a_real_interrupt_reaches_a_real_process(tmp_path):
    script = """
import sys, time, types
import compile_sparse.compiler
fake = types.ModuleType("compile_sparse.api")
def compile(model, **options):
    with options["progress"].task("slow"):
        print("started", flush=True)
        time.sleep(60)
fake.compile = compile
sys.modules[fake.__name__] = compile_sparse.api = fake
from compile_sparse.compiler.cli.main import main
sys.argv = ["compile-sparse", "M", "--target", "null"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "slow: stopped" in err
    assert "The same command resumes." in err


def test_a_closed_pipe_is_not_a_crash():
    command = f"{sys.executable} -m compile_sparse.compiler.cli.main targets --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
