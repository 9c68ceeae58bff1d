"""The null backend writes what it was given, one tensor at a time, and measures nothing."""

from __future__ import annotations

import hashlib
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

from compile_sparse.backends.null import NullBackend
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.ir.program import Binding, Output, Program
from compile_sparse.compiler.ir.safetensors_stream import write_safetensors
from compile_sparse.compiler.ir.weights import DerivedTensor, ResidentTensor, WeightStore
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target

TENSORS = {
    "z.half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a.codes": torch.tensor([-8, 7], dtype=torch.int8),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "flags": torch.tensor([True, False]),
}


def test_the_file_is_what_safetensors_reads(tmp_path):
    digest = write_safetensors(tmp_path / "w", {name: ResidentTensor(value) for name, value in TENSORS.items()})
    found = load_file(tmp_path / "w")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert digest == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()


def test_one_tensor_at_a_time(tmp_path):
    alive, most = 0, 0

    def source():
        def compute():
            nonlocal alive, most
            value = torch.zeros(8)
            alive += 1
            most = max(most, alive)

            def gone():
                nonlocal alive
                alive -= 1

            weakref.finalize(value, gone)
            return value

        return DerivedTensor((8,), torch.float32, compute)

    write_safetensors(tmp_path / "w", {str(index): source() for index in range(20)})
    assert most <= 2  # the next is loaded before the name of the last is rebound


def _program():
    graph = fx.Graph()
    graph.output((graph.placeholder("w"),))
    return Program(
        graph_module=fx.GraphModule(torch.nn.Module(), graph),
        bindings={"w": Binding("layer.weight")},
        inputs=(),
        outputs=(Output("w", "other"),),
        weights=WeightStore({"layer.weight": ResidentTensor(torch.ones(2, 2))}),
        kind="encoder",
        config={},
    )


def test_lowering(tmp_path):
    target, backend = find_target("null"), NullBackend()
    assert list(backend.plan(_program(), target)) == []
    lowered = backend.lower(_program(), target, tmp_path, SilentProgress())
    assert {path.name for path in tmp_path.iterdir()} == set(lowered.files) == {"program.txt", "weights.safetensors"}
    for name, digest in lowered.files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    text = (tmp_path / "program.txt").read_text()
    assert "layer.weight (parameter)" in text
    assert "placeholder" in text


def test_nothing_runs():
    probe = NullBackend().probe(find_target("null"))
    assert not probe.available
    assert probe.why_not == "This target has no runtime."
    with pytest.raises(EnvironmentFailure, match="CS5010"):
        NullBackend().worker_command(find_target("null"))
