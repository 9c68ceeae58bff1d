"""What the backend says of the TensorRT and the GPU that are here."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from compile_sparse.backends.tensorrt import processor
from compile_sparse.backends.tensorrt.engine.engines import Here
from compile_sparse.backends.tensorrt.engine.gpu import Gpu, find_gpu
from compile_sparse.compiler.targets.target import find_target

# What is here.


def test_probe_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "installed_builders", lambda: {"tensorrt_rtx": "1.7.1"})
    probe = processor.probe_runtime(find_target("trt-a100"))
    assert not probe.available
    assert probe.why_not == "The package tensorrt is not installed."
    assert "compile-sparse[tensorrt]" in probe.hint


@pytest.mark.parametrize(
    ("version", "gpu", "why"),
    [
        ("10.9.0", Gpu("NVIDIA A100-SXM4-80GB", "8.0"), "TensorRT 10.9.0 is older than 11"),
        ("11.4.0", None, "There is no GPU here; the target is an NVIDIA A100 (compute capability 8.0)"),
        ("11.4.0", Gpu("NVIDIA A30", "8.0"), "the GPU here is called 'NVIDIA A30'"),
        ("11.4.0", Gpu("NVIDIA A10", "8.6"), "NVIDIA A10 has compute capability 8.6, the target 8.0"),
        ("11.4.0", Gpu("NVIDIA A1000", "8.0"), "the GPU here is called 'NVIDIA A1000'"),
        ("11.4.0", Gpu("NVIDIA A100-SXM4-80GB", "8.0"), ""),
    ],
)
def test_probe(version: str, gpu: Gpu | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "installed_builders", lambda: {"tensorrt": version})
    monkeypatch.setattr(processor, "find_gpu", lambda: gpu)
    monkeypatch.setattr(processor, "_torch_has_cuda", lambda: True)
    probe = processor.probe_runtime(find_target("trt-a100"))
    assert probe.available is (why == "")
    assert why in probe.why_not
    assert probe.version == version
    if probe.available:
        assert probe.processor == "NVIDIA A100-SXM4-80GB 8.0"
        monkeypatch.setattr(processor, "_torch_has_cuda", lambda: False)
        assert "without CUDA" in processor.probe_runtime(find_target("trt-a100")).why_not


def test_what_is_installed_here() -> None:
    builders = processor.installed_builders()
    assert ("tensorrt_rtx" in builders) is (find_spec("tensorrt_rtx") is not None)
    assert "unknown" not in builders.values()
    assert processor.reference_version().split(".")[0].isdigit()
    found = processor.here()
    assert isinstance(found, Here)
    assert (found.compute_capability == "") is (find_gpu() is None)
