"""Installations resume, are left alone, are replaced; they stop as a whole and wait for each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes.environments import (
    find_runtime,
    runtimes_folder,
    write_record,
)
from compile_sparse.compiler.runtimes.install import install_runtime
from tests.unit.runtimes.toy_runtime import RECORD, Recorder, wheel


@pytest.mark.slow
def test_install_resumes_then_is_left_alone_then_is_replaced(wheels, folder):
    """The life of a runtime; one test, because each environment takes seconds to make."""
    with pytest.raises(EnvironmentFailure, match="CS5205") as caught:
        install_runtime("toy")
    assert "toydep" in caught.value.why
    assert find_runtime("toy") is None
    (environment,) = (folder / "toy").iterdir()
    (environment / "sentinel").write_text("of the first attempt")
    (folder / "toy" / "0.9-cpu-py3.0").mkdir()
    (folder / "toy.json").write_text("damaged")

    wheel(wheels, "toydep", "1.5")
    record = install_runtime("toy")
    assert (record.name, record.managed, record.device) == ("toy", True, "cpu")
    assert record.versions == {"toy": "1.0", "toydep": "1.5"}
    assert record.facts == {"isa": "avx2", "prefix": str(environment)}
    assert record == find_runtime("toy")
    assert (environment / "sentinel").exists(), "the second attempt continues the first"
    assert list((folder / "toy").iterdir()) == [environment], "what nobody uses any more is gone"
    assert not (wheels.parent / "elsewhere").exists()

    for options in ({}, {"version": "1.0"}, {"device": "cpu"}):
        assert install_runtime("toy", **options) == record
    for options in ({"version": "2.0"}, {"device": "cuda"}):
        with pytest.raises(UsageError, match="CS1054"):
            install_runtime("toy", **options)

    wheel(wheels, "toydep", "1.6")
    again = install_runtime("toy", force=True)
    assert again.versions["toydep"] == "1.6"
    assert not (environment / "sentinel").exists()


@pytest.mark.slow
def test_where_pip_sees_no_such_torch_uv_does_it(wheels, tmp_path):
    """uv is a stand-in that records how it was called: whether the real one finds the build is not tested."""
    wheel(wheels, "toy", requires=["toydep", "torch==1.0+cpu"])
    wheel(wheels, "toydep")
    recorded = tmp_path / "uv.json"
    wheel(wheels, "uv", code=f"import json, sys; open({str(recorded)!r}, 'w').write(json.dumps(sys.argv[1:]))")
    with pytest.raises(EnvironmentFailure, match="CS5206"):
        install_runtime("toy")  # nothing was installed
    arguments = json.loads(recorded.read_text())
    assert arguments[:3] == ["pip", "install", "--python"]
    assert arguments[4:] == ["--torch-backend", "cpu", "toydep", "torch==1.0+cpu"]
    assert Path(arguments[3]).is_relative_to(runtimes_folder())


def test_who_asks_for_a_version_gets_its_cpu_build(wheels):
    write_record(RECORD)
    assert install_runtime("toy", version="1.0") == RECORD
    with pytest.raises(UsageError, match="CS1054"):
        install_runtime("toy", version="1.0+other")


@pytest.mark.parametrize("version", ["../1", "1/2", "", "-r", "1 2"])
def test_a_version_is_only_a_version(wheels, version):
    with pytest.raises(UsageError, match="CS1053"):
        install_runtime("toy", version=version)


def test_interrupting_stops_all_of_pip(tmp_path):
    script = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); print('Collecting x', flush=True); time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        runtime_install._step([sys.executable, "-c", script], "toy", Recorder(interrupt=True).advance)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):  # ended by a signal, which takes a moment to arrive
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("a process that pip started goes on")


def test_a_second_installation_waits_and_takes_the_first_ones_record(wheels, folder):
    script = """
import sys
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes import environments as runtimes
from compile_sparse.compiler.progress import SilentProgress
from pathlib import Path
folder = runtimes.open_runtimes_folder()
with runtime_install._lock(folder / "toy.lock", "toy", SilentProgress()):
    print("locked", flush=True)
    sys.stdin.readline()
    runtimes.write_record(runtimes.RuntimeRecord.model_validate_json(sys.argv[1]))
"""
    command = [sys.executable, "-c", script, RECORD.model_dump_json()]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"

    class Waiting(Recorder):
        def advance(self, steps=1):
            if not other.stdin.closed:  # the second time the other one is gone
                other.stdin.write("\n")
                other.stdin.close()

    progress = Waiting()
    try:
        assert install_runtime("toy", progress=progress) == RECORD
    finally:
        other.wait(timeout=60)
    assert progress.labels == ["toy: waiting for another installation"]
