"""Each quantized form against the program's own reference, and proof that a wrong packing would be noticed.

MatMulNBits rounds activations to 8 bits inside each group (its fast mode), the program does not. The kernel's error is therefore
compared with a bound: with ``a_g`` the largest ``|x|`` of group g, rounding moves each activation by at most ``a_g / 254``, so a
result moves by at most ``sum_g a_g / 254 * sum_{k in g} |w_k|``. MatMulIntegerToFloat computes exactly what the program says,
up to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compile_sparse.backends.onnxruntime import linear
from compile_sparse.backends.onnxruntime.lowering import write_graph
from compile_sparse.backends.onnxruntime.packing import pack_blocks, packed_shape
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.quantize import Quantize
from tests.onnxruntime.conftest import FolderOf, ProgramOf
from tests.onnxruntime.running import run, session
from tests.support.tolerance import fp32_tolerance
from tests.toys import toy_program

SCHEMES = ("w8a8", "w8a16", "w4a16", "w4a16-g32")


class _Conv1D(nn.Module):
    """``addmm`` with an ``[in, out]`` weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class _Linear(nn.Module):
    """``linear`` with an ``[out, in]`` weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _layer(kind: str, in_features: int, scheme: str) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(in_features)
    module = _Conv1D(in_features, 24) if kind == "addmm" else _Linear(in_features, 24, kind == "linear with bias")
    x = torch.randn(5, in_features)
    program = toy_program(module, [x])
    context = PassContext(target=find_target("ort-cpu"), progress=SilentProgress())
    return Quantize(scheme=scheme).run(program, context).program, x


def _run_layer(program: Program, x: torch.Tensor, folder: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    emission, _ = write_graph(program, folder, SilentProgress())
    expected = Executor(program).run({"x0": x})["y0"]
    return run(session(folder), {"x0": x})["y0"], expected, emission.forms


def _activation_bound(program: Program, x: torch.Tensor) -> torch.Tensor:
    node = next(n for n in program.graph.nodes if "dequantize_weight" in str(n.target))
    q, scale, axis, group = node.args[:4]
    codes = program.weights.load(program.tensor_of(q))
    scales = program.weights.load(program.tensor_of(scale))
    weight = torch.ops.compile_sparse.dequantize_weight(codes, scales, axis, group)
    rows = weight if axis == 1 else weight.t()
    bound = torch.zeros(x.shape[0], rows.shape[0])
    for start in range(0, x.shape[1], group):
        part = slice(start, start + group)
        bound += x[:, part].abs().amax(1, keepdim=True) / 254 * rows[:, part].abs().sum(1)
    return bound + 1e-5


@pytest.mark.parametrize("kind", ["linear", "linear with bias", "addmm"])
@pytest.mark.parametrize("in_features", [128, 88, 200])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_layer(kind: str, in_features: int, scheme: str, tmp_path: Path) -> None:
    """Widths that fill, do not reach and overrun a group of 128."""
    program, x = _layer(kind, in_features, scheme)
    got, expected, forms = _run_layer(program, x, tmp_path)
    assert "MatMul" not in forms
    if scheme == "w8a8":
        torch.testing.assert_close(got, expected, rtol=0, atol=fp32_tolerance(expected, in_features, 1))
    else:
        assert bool(((got - expected).abs() <= _activation_bound(program, x)).all())


def _swapped_nibbles(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    packed = pack_blocks(codes, bits, block)
    return (packed >> 4) | (packed << 4)


def _wrong_zero_point(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    return pack_blocks(codes, bits, block) ^ np.uint8(0x88)


@pytest.mark.parametrize("mutant", [_swapped_nibbles, _wrong_zero_point])
def test_a_wrong_packing_would_be_noticed(
    mutant: Callable[[np.ndarray, int, int], np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(linear, "pack_blocks", mutant)
    program, x = _layer("linear", 128, "w4a16-g32")
    got, expected, _ = _run_layer(program, x, tmp_path)
    assert not bool(((got - expected).abs() <= _activation_bound(program, x)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_round_trip(bits: int) -> None:
    codes = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 50), dtype=np.int8)
    packed = pack_blocks(codes, bits, 32)
    assert packed.shape == packed_shape(3, 50, bits, 32)
    flat = packed.reshape(3, -1)
    unpacked = flat if bits == 8 else np.stack([flat & 15, flat >> 4], -1).reshape(3, -1)
    assert np.array_equal(unpacked.astype(np.int16)[:, :50] - (1 << (bits - 1)), codes)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_model(program_of: ProgramOf, folder_of: FolderOf, name: str, scheme: str) -> None:
    """Against the noise that quantization itself makes.

    w8a8 is the same arithmetic, except that a rounding may fall the other way; weights-only schemes add 8-bit activations,
    about as much noise as 8-bit weights (rms at most twice) and far less than 4-bit ones (at most a quarter).
    """
    folder, lowered, program = folder_of(name, scheme)
    assert not lowered.diagnostics
    assert lowered.form["GroupQueryAttention"] == 2
    inputs = decoder_inputs(program, torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3)))
    dense = Executor(program_of(name)).run(inputs)["logits"]
    expected = Executor(program).run(inputs)["logits"]
    got = run(session(folder), inputs)["logits"]
    noise, error = (float(value.pow(2).mean().sqrt()) for value in (expected - dense, got - expected))
    allowed = {"w8a8": 0.5, "w8a16": 2.0, "w4a16": 0.25, "w4a16-g32": 0.25}[scheme]
    assert error <= allowed * noise
    assert noise > 0


def test_activations_are_quantized_once_per_value(folder_of: FolderOf) -> None:
    onnx = pytest.importorskip("onnx")
    folder, _, _ = folder_of("llama", "w8a8")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    # Per layer: q/k/v, o, gate/up and down; and the head.
    assert kinds.count("QuantizeLinear") == kinds.count("ReduceMax") == 2 * 4 + 1
    assert kinds.count("MatMulIntegerToFloat") == 2 * 7 + 1
    assert "DequantizeLinear" not in kinds
    assert all(len(tensor.raw_data) < 1024 for tensor in graph.initializer)


def test_a_form_without_kernel_is_multiplied_out_and_reported(tmp_path: Path) -> None:
    program, x = _layer("linear", 128, "w8a8")
    node = next(n for n in program.graph.nodes if "fake_quantize" in str(n.target))
    node.replace_all_uses_with(node.args[0])
    emission, _ = write_graph(program, tmp_path, SilentProgress())
    assert [found.code for found in emission.diagnostics] == ["CS2310"]
    expected = Executor(program).run({"x0": x})["y0"]
    got = run(session(tmp_path), {"x0": x})["y0"]
    torch.testing.assert_close(got, expected, rtol=0, atol=fp32_tolerance(expected, 128, 1))
