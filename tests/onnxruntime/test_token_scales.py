"""Activations with one scale per token: the runtime's codes are the program's, bit for bit, whatever else is in the batch.

The weights of the exact tests are integers below 32 with scale 1, so that torch's float32 sums of products of codes are exact too
(below 2^24), and any difference is one of codes, rows or scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnxruntime import emit_activations, linear
from compile_sparse.backends.onnxruntime.emit_activations import TokenCodes
from compile_sparse.backends.onnxruntime.lowering import write_graph
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from tests.onnxruntime.conftest import FolderOf
from tests.onnxruntime.running import run, session
from tests.toys import Applied, toy_program

ours = torch.ops.compile_sparse
DEPTH, CHANNELS = 96, 24


def rows() -> torch.Tensor:
    """Ordinary tokens, and: zero, one element, an outlier of 3,000, exact ties of codes, tiny and huge numbers."""
    made = torch.randn(300, DEPTH, generator=torch.Generator().manual_seed(0))
    made[0] = 0
    made[1], made[1, 5] = 0, -3.0
    made[2, 7] = 3000.0
    made[3] = torch.arange(DEPTH) / 2 - 20  # with the largest at 127 every second one is a tie
    made[3, 0] = 127.0
    made[4] *= 1e-20
    made[5] *= 1e-33
    made[6] *= 1e35
    made[7:40] = made[7:40].bfloat16().float()
    made[7:40, 1] = made[7:40].abs().amax(1)
    made[7:40, 2] = made[7:40, 1] / 2  # 63.5 steps
    return made


def product(bias: bool) -> tuple[Program, torch.Tensor]:
    """``linear(fake_quantize(x), W)`` of integers, and ``x``."""
    x = rows()
    weight = torch.randint(-31, 32, (CHANNELS, DEPTH), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, added = torch.ones(CHANNELS), torch.linspace(-1, 1, CHANNELS) if bias else None

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = torch.nn.Parameter(weight, requires_grad=False), torch.nn.Parameter(scale)
            self.bias = None if added is None else torch.nn.Parameter(added)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = ours.dequantize_weight(self.weight, self.scale, 1, 0, 8)
            return torch.nn.functional.linear(ours.fake_quantize(x, "int8"), wide, self.bias)

    return toy_program(Layer(), [x], [{0: torch.export.Dim("tokens")}]), x


def in_the_runtime(program: Program, x: torch.Tensor, folder: Path) -> torch.Tensor:
    write_graph(program, folder, SilentProgress())
    return run(session(folder), {"x0": x})["y0"]


def exact(x: torch.Tensor, program: Program) -> torch.Tensor:
    """``sum(codes * W) * s``: the sums are integers."""
    peak = x.abs().amax(1, keepdim=True).clamp_min(1e-30)
    scale = peak / 127.0
    codes = torch.round(x * (1.0 / scale))
    tensor = next(name for name in program.weights if name.endswith("weight"))
    return (codes.double() @ program.weights.load(tensor).double().t()).float() * scale


def test_the_values_are_the_programs_bit_for_bit(tmp_path: Path) -> None:
    x = rows()
    program = toy_program(Applied(lambda x: ours.fake_quantize(x, "int8")), [x], [{0: torch.export.Dim("tokens")}])
    expected = Executor(program).run({"x0": x})["y0"]
    assert torch.equal(in_the_runtime(program, x, tmp_path), expected)
    ratio = expected / (x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0)
    assert float(ratio.abs().max()) <= 127.001
    assert len(ratio.round().unique()) == 255


@pytest.mark.parametrize("bias", [False, True])
def test_the_products_are_those_of_the_codes(bias: bool, tmp_path: Path) -> None:
    program, x = product(bias)
    found = in_the_runtime(program, x, tmp_path)
    expected = exact(x, program)
    if bias:
        expected = expected + torch.linspace(-1, 1, CHANNELS)
    assert torch.equal(found, expected)
    ordinary = slice(7, None)  # float32 sums of products that share a huge or tiny factor cancel to other last bits
    in_torch = Executor(program).run({"x0": x})["y0"]
    torch.testing.assert_close(in_torch[ordinary], expected[ordinary], rtol=1e-4, atol=1e-2)


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    program, x = product(bias=False)
    found = in_the_runtime(program, x, tmp_path)
    loaded = session(tmp_path)
    for chosen in ([0], [2], [9], list(range(50)), [299, 2, 2, 9]):
        assert torch.equal(run(loaded, {"x0": x[chosen]})["y0"], found[chosen])


def test_a_sequence_does_not_depend_on_the_others_of_its_batch(folder_of: FolderOf) -> None:
    """A whole decoder. Other batch sizes choose other float32 kernels for attention, whose last bits differ."""
    folder, lowered, program = folder_of("llama", "w8a8")
    assert not any("other rows" in limit for limit in lowered.limits)
    loaded, ids = session(folder), torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(5))
    together = run(loaded, decoder_inputs(program, ids))["logits"]
    for row in range(4):
        others = ids.clone()
        others[torch.arange(4) != row] = torch.randint(3, 96, (3, 12))
        beside = run(loaded, decoder_inputs(program, others))["logits"]
        assert torch.equal(beside[row], together[row])


# -- mutants: each of them must be told from the right graph


def _another_zero_point(codes: TokenCodes, emission: Emission) -> TokenCodes:
    return replace(codes, zero_point=emission.graph.constant(127, "uint8"))


def _of_the_next_row(codes: TokenCodes, emission: Emission) -> TokenCodes:
    graph = emission.graph
    size = graph.call("Shape", [codes.scale], start=0, end=1)
    last = graph.call("Sub", [size, graph.constant([1])])
    starts, ends = graph.constant([0]), graph.constant([1 << 40])
    front = graph.call("Slice", [codes.scale, starts, last, starts])
    back = graph.call("Slice", [codes.scale, last, ends, starts])
    return replace(codes, scale=graph.call("Concat", [back, front], axis=0))


def _one_for_all(codes: TokenCodes, emission: Emission) -> TokenCodes:
    return replace(
        codes, scale=emission.graph.call("ReduceMax", [codes.scale, emission.graph.constant([0])], keepdims=1)
    )


@pytest.mark.parametrize("mutant", [_another_zero_point, _of_the_next_row, _one_for_all])
def test_a_wrong_scale_or_zero_point_would_be_noticed(
    mutant: Callable[[TokenCodes, Emission], TokenCodes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = linear.token_codes
    monkeypatch.setattr(linear, "token_codes", lambda emission, node: mutant(right(emission, node), emission))
    program, x = product(bias=False)
    assert not torch.equal(in_the_runtime(program, x, tmp_path), exact(x, program))


def zero_points(folder: Path) -> list[Any]:
    """Of every integer GEMM and of what makes its codes."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    places = {"MatMulIntegerToFloat": 4, "QuantizeLinear": 2}
    names = [node.input[places[node.op_type]] for node in graph.node if node.op_type in places]
    return [numpy_helper.to_array(stored[name]) for name in names]


def test_codes_are_unsigned(folder_of: FolderOf) -> None:
    """Signed ones fall off the fast kernels: a fourth of float32's speed, or no kernel at all."""
    found = zero_points(folder_of("llama", "w8a8")[0])
    assert len(found) == 2 * (4 + 7) + 2
    assert all(value.dtype == np.uint8 and value == 128 for value in found)


def test_signed_codes_would_be_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def signed(emission: Emission) -> tuple[str, str]:
        return emission.graph.constant(0.5, "float32"), emission.graph.constant(0, "int8")

    monkeypatch.setattr(emit_activations, "_constants", signed)
    write_graph(product(bias=False)[0], tmp_path, SilentProgress())
    assert any(value.dtype != np.uint8 for value in zero_points(tmp_path))
