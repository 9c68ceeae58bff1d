"""The real TensorRT-RTX builder, without a GPU: what it takes, and its refusals in our words."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

from compile_sparse.backends.tensorrt.engine import builder
from compile_sparse.backends.tensorrt.engine.build_errors import explain, source_module
from compile_sparse.backends.tensorrt.engine.build_messages import BuildReply
from compile_sparse.backends.tensorrt.engine.build_progress import TOTAL, BuildProgress
from compile_sparse.backends.tensorrt.engine.builder import BuildRequest, Built, build
from compile_sparse.backends.tensorrt.engine.capabilities import built_for
from compile_sparse.backends.tensorrt.engine.gpu import Gpu
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal
from compile_sparse.compiler.progress import SilentProgress
from tests.tensorrt.graphs import MODULE, K, N, decoder, decoder_profiles, dynamic, linear, save

if find_spec("tensorrt_rtx") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)


def request(path: Path, capability: str = "8.0", **options: Any) -> BuildRequest:
    options = {"engine": None, "profiles": dynamic(), **options}
    return BuildRequest(path, builder="tensorrt_rtx", compute_capability=capability, **options)


def check(path: Path, capability: str = "8.0", **options: Any) -> Built:
    return build(request(path, capability, **options), SilentProgress())


def refused(path: Path, capability: str = "8.0", **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check(path, capability, **options)
    return caught.value


def test_an_engine_is_written_whole_with_its_digest(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    built = check(save(linear("fp16"), tmp_path), engine=engine, sparse=True)
    content = engine.read_bytes()
    assert (built.sha256, built.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert len(content) > 2 * K * N, "the weights are in it"
    assert built.builder == "tensorrt_rtx"
    assert built.compute_capability == "8.0"
    assert built.substitute == built.gpu == ""
    assert built.version.split(".")[0].isdigit()
    assert built.flags == ("SPARSE_WEIGHTS",)
    assert built.seconds > 0
    assert built.peak_rss_bytes > 50 << 20
    assert built.layers == 2  # the weight and the product
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.onnx"]
    assert not [line for line in built.messages if "cudaError" in line], "no driver is no error here"


@pytest.mark.parametrize(
    ("form", "takes", "refuses", "missing"),
    [
        ("int8", ["8.0"], [], ""),
        ("int4", ["8.0"], [], ""),
        ("fp8", ["8.9", "9.0"], ["8.0", "8.6"], "FP8"),
        ("nvfp4", ["12.0", "10.0"], ["8.9"], "FP4"),
    ],
)
def test_formats_need_hardware_that_has_them(
    form: str, takes: list[str], refuses: list[str], missing: str, tmp_path: Path
) -> None:
    path = save(linear(form), tmp_path)
    for capability in takes:
        assert check(path, capability).bytes > 0
    for capability in refuses:
        error = refused(path, capability)
        assert error.code == "CS4402"
        assert capability in error.what
        assert missing in error.what
        assert f"sm{capability.replace('.', '')}" in error.why


def test_a_stand_in_says_so(tmp_path: Path) -> None:
    built = check(save(linear("fp16"), tmp_path), "9.0")
    assert built.compute_capability == "8.9"
    assert "9.0" in built.substitute
    assert "8.9 stood in" in built.substitute
    expected = {
        "8.0": "SM80",
        "8.6": "SM86",
        "8.7": "SM86",
        "8.9": "SM89",
        "9.0": "SM89",
        "10.0": "SM120",
        "12.0": "SM120",
    }
    assert {asked: built_for(asked).name for asked in expected} == expected
    assert [asked for asked in expected if built_for(asked).substitute] == ["8.7", "9.0", "10.0"]
    with pytest.raises(Refusal, match="CS4410") as caught:
        built_for("7.0")
    assert "8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 12.0" in caught.value.why


def test_a_decoder_with_two_profiles_and_external_weights(tmp_path: Path) -> None:
    profiles = decoder_profiles()
    path = save(decoder(), tmp_path, external=True)
    assert path.stat().st_size < 60_000 < (tmp_path / "model.onnx.data").stat().st_size
    assert check(path, profiles=profiles).bytes > 0
    parsed = check(path, profiles=[], parse_only=True)
    assert parsed.layers > 50
    assert (parsed.sha256, parsed.bytes) == ("", 0)


def test_attention_needs_a_kernel_or_may_be_taken_apart(tmp_path: Path) -> None:
    error = refused(save(decoder(precision="float32"), tmp_path), profiles=decoder_profiles())
    assert error.code == "CS4404"
    assert "TRT_decomposable" in error.hint
    taken_apart = save(decoder(precision="float32", decomposable=True), tmp_path)
    assert check(taken_apart, profiles=decoder_profiles()).bytes > 0


@pytest.mark.parametrize("operator", ["Frobnicate", "MatMulInteger"])
def test_an_operator_that_the_parser_lacks_is_named_with_its_module(operator: str, tmp_path: Path) -> None:
    error = refused(save(linear("fp16", operator=operator), tmp_path))
    assert error.code == "CS4401"
    assert operator in error.what
    assert error.where == f"{operator} {MODULE}/{operator}_3 (module {MODULE})"


def test_a_node_that_the_parser_refuses(tmp_path: Path) -> None:
    model = linear("fp16")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    error = refused(save(model, tmp_path))
    assert error.code == "CS4400"
    assert f"MatMul {MODULE}/MatMul_3 (module {MODULE})" == error.where
    assert "INVALID_NODE" in error.why
    assert "Float" in error.why
    assert "Half" in error.why
    assert "cudaError" not in error.why


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (None, "A dimension varies and there is no profile"),
        ({}, "no range"),
        ({"y": [[1, K], [2, K], [4, K]]}, "no range"),
        ({"x": [[1], [2], [4]]}, "does not have the input's dimensions"),
        ({"x": [[4, K], [2, K], [1, K]]}, "not least, optimal, largest"),
        ({"x": [[1, K + 1], [2, K + 1], [4, K + 1]]}, "changes a dimension that is fixed"),
    ],
)
def test_a_dimension_that_varies_needs_a_range(shapes: dict[str, Any] | None, why: str, tmp_path: Path) -> None:
    profiles = [] if shapes is None else [{"name": "samples", "shapes": shapes}]
    error = refused(save(linear("fp16"), tmp_path), profiles=profiles)
    assert error.code == "CS4403"
    assert error.where == f"x [batch, {K}]"
    assert why in error.why
    assert ("samples" in error.why) is (shapes is not None)


@pytest.mark.parametrize(("broken", "why"), [("missing", "model.onnx.data"), ("short", "file size=100")])
def test_external_weights_that_are_not_there(broken: str, why: str, tmp_path: Path) -> None:
    path = save(linear("fp16"), tmp_path, external=True)
    data = tmp_path / "model.onnx.data"
    data.unlink() if broken == "missing" else os.truncate(data, 100)
    error = refused(path)
    assert error.code == "CS4405"
    assert why in error.why


def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    """In one file they are refused before they are read; beside it they are read at offsets that 32 bits do not hold."""
    path, weights = save(linear("fp16"), tmp_path, external=True), tmp_path / "model.onnx.data"
    values = weights.read_bytes()
    offset = 5 << 29  # 2.5 GiB; a file with a hole takes no space
    with weights.open("wb") as file:
        file.seek(offset)
        file.write(values)
    model = onnx.load(path, load_external_data=False)
    (entry,) = [entry for entry in model.graph.initializer[0].external_data if entry.key == "offset"]
    entry.value = str(offset)
    path.write_bytes(model.SerializeToString())
    engine = tmp_path / "model.engine"
    assert check(path, engine=engine).bytes > 2 * K * N
    row = np.frombuffer(values, np.float16)[:8].tobytes()
    assert row in engine.read_bytes(), "the weights at that offset, not zeros of the hole"

    with path.open("wb") as file:
        file.truncate(3 << 30)
    error = refused(path)
    assert error.code == "CS4406"
    assert "3,221,225,472" in error.why


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None], ids=["empty", "other", "half"])
def test_files_that_are_no_model(content: bytes | None, tmp_path: Path) -> None:
    path = save(linear("fp16"), tmp_path)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    assert refused(path).code == "CS4408"
    path.unlink()
    assert refused(path).code == "CS4408"


def test_a_graph_that_the_builder_fails_on_gives_its_reason(tmp_path: Path) -> None:
    model = linear("fp16")
    del model.graph.output[:]
    error = refused(save(model, tmp_path))
    assert error.code == "CS4407"
    assert "at least one output" in error.why


@pytest.mark.parametrize(
    ("log", "code"),
    [
        (["[E] Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)"], "CS5212"),
        (
            ["[W] out of memory, so tactics were skipped", "[E] Error Code 10: Could not find any implementation"],
            "CS4407",
        ),
        ([], "CS4407"),
    ],
)
def test_messages_of_builds_on_a_gpu(log: list[str], code: str, tmp_path: Path) -> None:
    error = explain(BuildReply(log, "build"), request(tmp_path / "model.onnx"))
    assert error.code == code
    assert error.why


def test_no_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailure, match="CS5210") as caught:
        check(save(linear("fp16"), tmp_path))
    assert caught.value.hint == "pip install 'compile-sparse[tensorrt-rtx]'"


def test_a_builder_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here TensorRT is not installed; the process that finds out is told to go on all the same."""
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    monkeypatch.setattr(builder, "find_spec", lambda name: True)
    monkeypatch.setattr(builder, "find_gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    asked = BuildRequest(save(linear("fp16"), tmp_path), None, "tensorrt", "8.0", dynamic())
    with pytest.raises(EnvironmentFailure, match="CS5211") as caught:
        build(asked, SilentProgress())
    assert "No module named 'tensorrt'" in caught.value.why


@pytest.mark.parametrize(("gpu", "why"), [(None, "none here"), (Gpu("NVIDIA A10", "8.6"), "NVIDIA A10, has 8.6")])
def test_tensorrt_builds_on_the_gpu_it_builds_for(
    gpu: Gpu | None, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(builder, "find_spec", lambda name: True)
    monkeypatch.setattr(builder, "find_gpu", lambda: gpu)
    asked = BuildRequest(save(linear("fp16"), tmp_path), None, "tensorrt", "8.0", dynamic())
    with pytest.raises(EnvironmentFailure, match="CS5213") as caught:
        build(asked, SilentProgress())
    assert why in caught.value.why


def test_a_disk_that_takes_no_engine(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    with pytest.raises(EnvironmentFailure, match="CS5003"):
        check(save(linear("fp16"), tmp_path), engine=folder / "model.engine")


class Recorded:
    """Progress that remembers, and may interrupt."""

    def __init__(self, stop_at: int = TOTAL + 1) -> None:
        self.done, self.calls, self.stop_at = 0, 0, stop_at

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Recorded]:
        assert total == TOTAL
        yield self

    def advance(self, steps: int = 1) -> None:
        assert steps >= 0
        self.done, self.calls = self.done + steps, self.calls + 1
        if self.done >= self.stop_at:
            raise KeyboardInterrupt


def test_progress_grows_to_its_end(tmp_path: Path) -> None:
    seen = Recorded()
    build(request(save(linear("fp16"), tmp_path)), seen)
    assert seen.done == TOTAL
    assert seen.calls > 5


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    path, engine = save(decoder(), tmp_path), tmp_path / "model.engine"
    mine = psutil.Process()
    before = set(mine.children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        build(request(path, engine=engine, profiles=decoder_profiles()), Recorded(stop_at=1))
    assert not engine.exists()
    assert set(mine.children(recursive=True)) <= before


def test_a_build_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    """Nobody reads its progress: it stops at the next step instead of going on for hours."""
    path, engine = save(decoder(), tmp_path), tmp_path / "model.engine"
    command = [sys.executable, "-P", "-m", "compile_sparse.backends.tensorrt.engine.builder_worker", "tensorrt_rtx"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin
    assert process.stdout
    fields = {
        "onnx": str(path),
        "engine": str(engine),
        "capability_name": "SM80",
        "sparse": False,
        "timing_cache": None,
    }
    message = {"id": 1, "op": "build", "parse_only": False, "profiles": decoder_profiles(), **fields}
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    process.stdout.readline()  # the first step
    process.stdout.close()
    process.stdin.close()
    process.wait(timeout=60)
    assert not engine.exists()


def test_nested_phases_are_parts_of_a_step() -> None:
    seen: list[int] = []
    progress = BuildProgress(seen.append)
    progress.start("all", None, 4)
    progress.step("all", 0)
    progress.start("inner", "all", 2)
    progress.step("inner", 0)
    progress.step("inner", 0)  # repeated: nothing new
    progress.finish("inner")
    progress.step("all", 1)
    progress.step("unknown", 3)
    threads = [threading.Thread(target=progress.step, args=("all", step)) for step in (2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.finish("all")
    assert seen == sorted(set(seen))
    assert seen[:3] == [250, 375, 500]
    assert seen[-1] == TOTAL


def test_names_of_nodes_tell_the_module() -> None:
    assert source_module("model.layers.0.mlp.gate_proj/MatMul_12") == "model.layers.0.mlp.gate_proj"
    assert source_module("/MatMul_12") == ""
    assert source_module("MatMul") == ""
