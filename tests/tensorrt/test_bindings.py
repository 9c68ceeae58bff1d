"""The bindings in this process: what the builder is told, and that types are checked against the installed module."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compile_sparse.backends.tensorrt.engine import bindings
from compile_sparse.backends.tensorrt.engine.build_messages import Build
from compile_sparse.compiler.runtimes.wire import read
from tests.tensorrt.graphs import dynamic, linear, save
from tests.tensorrt.vendor_stubs import repair, write_stubs

if find_spec("tensorrt_rtx") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def trt() -> Any:
    return bindings.choose("tensorrt_rtx")


def asked(path: Path, **changed: Any) -> Build:
    made = {"onnx": str(path), "engine": None, "profiles": dynamic(), "sparse": False, "timing_cache": None}
    return read(Build, {**made, "capability_name": "SM80", "parse_only": False, **changed})


def test_one_vendor_per_process(trt: Any) -> None:
    assert bindings.trt is trt
    assert bindings.choose("tensorrt_rtx") is trt
    with pytest.raises(RuntimeError, match="uses tensorrt_rtx already"):
        bindings.choose("tensorrt")


def test_nothing_is_chosen_by_importing() -> None:
    script = "import compile_sparse.backends.tensorrt.engine.bindings as b, sys\nassert 'tensorrt_rtx' not in sys.modules\nb.trt"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "no bindings are chosen yet" in done.stderr


def test_what_the_builder_is_told(trt: Any) -> None:
    from compile_sparse.backends.tensorrt.engine.network_build import _configure
    from compile_sparse.backends.tensorrt.engine.observers import Log

    log = Log(driverless=True)
    builder = trt.Builder(log)
    for sparse in (False, True):
        config = _configure(builder, asked(Path("m"), sparse=sparse))
        assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS) is sparse
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert config.num_compute_capabilities == 1
        assert config.get_compute_capability(0) == trt.ComputeCapability.SM80


def test_what_is_kept_of_the_log(trt: Any) -> None:
    from compile_sparse.backends.tensorrt.engine.observers import Log

    severity = trt.ILogger.Severity
    said = [
        (severity.VERBOSE, "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b"),
        (severity.VERBOSE, "Applying generic optimizations"),
        (severity.INFO, "Total Activation Memory"),
        (severity.WARNING, "slow"),
        (severity.ERROR, "wrong"),
        (severity.ERROR, "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"),
        (severity.INTERNAL_ERROR, "broken"),
    ]
    for driverless, more in ((True, 0), (False, 1)):
        log = Log(driverless=driverless)
        for kind, text in said:
            log.log(kind, text)
        assert [line[:3] for line in log.lines] == ["[V]", "[W]", "[E]", *["[E]"] * more, "[F]"]
        assert "eligible" in log.lines[0]


class Config:
    """A builder's configuration that takes timing caches which start with its own mark, as TensorRT takes its own GPU's.

    TensorRT-RTX times nothing: its caches are empty.
    """

    def __init__(self) -> None:
        self.used: bytes | None = None

    def create_timing_cache(self, stored: bytes) -> bytes | None:
        return None if stored == b"garbage" else stored or b"mine: new"

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if not cache.startswith(b"mine"):
            return False
        self.used = cache
        return True


@pytest.mark.parametrize(
    ("stored", "used", "warned"),
    [
        (None, b"mine: new", False),
        (b"mine: old", b"mine: old", False),
        (b"of another GPU", b"mine: new", True),
        (b"garbage", b"mine: new", True),
    ],
)
def test_timing_caches_of_others_are_replaced(
    stored: bytes | None, used: bytes, warned: bool, trt: Any, tmp_path: Path
) -> None:
    from compile_sparse.backends.tensorrt.engine.network_build import _load_timing_cache
    from compile_sparse.backends.tensorrt.engine.observers import Log

    config, log, path = Config(), Log(driverless=False), tmp_path / "timing.cache"
    if stored is not None:
        path.write_bytes(stored)
    assert _load_timing_cache(config, str(path), log) == used  # type: ignore[arg-type]
    assert config.used == used
    assert bool(log.lines) is warned
    assert _load_timing_cache(Config(), None, log) is None  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_written_after_a_build(trt: Any, tmp_path: Path) -> None:
    from compile_sparse.backends.tensorrt.engine.network_build import run_build

    path, cache = save(linear("fp16"), tmp_path), tmp_path / "timing.cache"
    seen: list[int] = []
    assert not run_build(asked(path, timing_cache=str(cache)), seen.append).failure
    assert seen
    assert cache.is_file()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["model.onnx", "timing.cache"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "class A:\n    def f(self, a=..., b) -> int: ...\n",
            "class A:\n    def f(self, *args, **kwargs) -> int: ...\n",
        ),
        ("class A:\n    def f(self, a, b=...) -> int: ...\n", "class A:\n    def f(self, a, b=...) -> int: ...\n"),
    ],
)
def test_functions_that_are_no_python_take_anything(text: str, expected: str) -> None:
    assert repair(text) == expected
    with pytest.raises(SyntaxError):
        repair("class A:\n    b =\n")


def test_types_are_those_of_the_installed_module(tmp_path: Path) -> None:
    """A wrong name, a wrong type and a wrong number of arguments are errors; the right ones are not."""
    write_stubs(tmp_path / "stubs")
    right = [
        "import tensorrt_rtx as trt",
        "def build(log: trt.ILogger) -> trt.IHostMemory:",
        "    builder = trt.Builder(log)",
        "    config = builder.create_builder_config()",
        "    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)",
        "    return builder.build_serialized_network(builder.create_network(0), config)",
    ]
    wrong = [
        "def wrong(log: trt.ILogger) -> None:",
        "    config = trt.Builder(log).create_builder_config()",
        "    config.set_flags(trt.BuilderFlag.SPARSE_WEIGHTS)",
        "    config.set_flag(trt.BuilderFlag.SPARSE)",
        "    config.set_flag('SPARSE_WEIGHTS')",
        "    trt.Builder()",
    ]
    (tmp_path / "code.py").write_text("\n".join(right + wrong) + "\n")
    settings = f"[mypy]\nmypy_path = {tmp_path / 'stubs'}\ncache_dir = {tmp_path / 'cache'}\n"
    settings += "".join(
        f"[mypy-{name}.*]\nignore_errors = True\n" for name in ("tensorrt_rtx", "tensorrt_rtx_bindings")
    )
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "code.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    places = [line.split(":")[1] for line in done.stdout.splitlines() if "error:" in line]
    assert places == ["9", "10", "11", "12"], done.stdout + done.stderr
