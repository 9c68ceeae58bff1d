"""Workers run where compile-sparse is not installed, and load nothing of it but what they are made of."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from compile_sparse.backends.worker import start

ROOMS = ("compile_sparse.backends.worker", "compile_sparse.compiler.runtimes")

# What a worker loaded is told when it ends; the vLLM worker ends the process itself.
SCRIPT = """
import importlib.util, os, runpy, sys
assert importlib.util.find_spec("compile_sparse") is None
def tell(*code):
    print(*sorted(sys.modules), file=sys.stderr)
os._exit = tell
sys.path[:0] = [os.environ["PACKAGES"]]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    tell()
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with numpy and ONNX Runtime, and a vLLM that has a version and nothing else."""
    for name in ("numpy", "onnxruntime", "google", "flatbuffers", "packaging"):
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            (tmp_path / name).symlink_to(next(iter(spec.submodule_search_locations)))
    libraries = Path(find_spec("numpy").origin).parents[1] / "numpy.libs"  # type: ignore[union-attr, arg-type]
    if libraries.is_dir():
        (tmp_path / libraries.name).symlink_to(libraries)
    (tmp_path / "vllm-0.1.dist-info").mkdir()
    (tmp_path / "vllm-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1\n")
    return tmp_path


@pytest.mark.parametrize("backend", ["onnxruntime", "vllm"])
def test_a_worker_starts_without_compile_sparse(backend: str, packages: Path) -> None:
    module = f"compile_sparse.backends.{backend}.worker"
    if backend == "onnxruntime" and find_spec(backend) is None:
        pytest.skip("ONNX Runtime is not installed")
    command = [sys.executable, "-S", "-P", "-c", SCRIPT, *start.command(module)[2:]]
    requests = [{"id": 1, "op": "hello"}, {"id": 2, "op": "bandwidth", "threads": 1}, {"id": 3, "op": "shutdown"}]
    done = subprocess.run(
        command,
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={"PACKAGES": str(packages)},
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=120,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply["ok"] for reply in replies] == [True] * 3, done.stdout + done.stderr
    assert replies[0]["result"]["runtime"]["name"] == backend
    loaded = done.stderr.splitlines()[-1].split()
    ours = {name for name in loaded if name.startswith("compile_sparse.") and name.count(".") > 1}
    parents = {f"compile_sparse.backends.{backend}"}
    strangers = {n for n in ours - parents if not n.startswith((*ROOMS, f"compile_sparse.backends.{backend}."))}
    assert not strangers
    assert f"compile_sparse.backends.{backend}.backend" not in loaded
    assert not {"torch", "pydantic", "psutil", "compile_sparse.api"} & set(loaded)


def test_what_an_interpreter_is_started_with(tmp_path: Path) -> None:
    """The folder of a runtime's own packages comes first; this folder's modules shadow none of them."""
    command = start.command("compile_sparse.backends.vllm.worker", str(tmp_path), python="/other/python")
    assert command[:2] == ["/other/python", "-P"]
    assert Path(command[2]).is_file()
    assert command[3:] == ["compile_sparse.backends.vllm.worker", str(tmp_path)]


def test_no_helper_is_defined_twice() -> None:
    """What two workers need is in the package they share."""
    backends = Path(start.__file__).parents[1]
    files = [
        *backends.glob("*/worker.py"),
        *backends.glob("*/run/worker.py"),
        *Path(start.__file__).parent.glob("*.py"),
    ]
    names = [
        node.name for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert len(files) > 10
    assert {name for name in names if names.count(name) > 1} == {"main"}
