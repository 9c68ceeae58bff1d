"""What a GEMM is: the factors, the contraction and the sizes, in every form torch has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compile_sparse.compiler.ir.gemms import Gemm, gemm_of, multiplies
from tests.toys import Applied, toy_program

# function, shapes of its inputs, then: number of the input, the weight and the bias (None: none), axis, K, N, kernel
CASES: dict[str, tuple[Any, ...]] = {
    "linear": (F.linear, [(3, 4), (5, 4), (5,)], 0, 1, 2, 1, 4, 5, 1),
    "linear by name": (lambda x, w: F.linear(weight=w, input=x), [(3, 4), (5, 4)], 0, 1, None, 1, 4, 5, 1),
    "addmm": (torch.addmm, [(5,), (3, 4), (4, 5)], 1, 2, 0, 0, 4, 5, 1),
    "mm": (torch.mm, [(3, 4), (4, 5)], 0, 1, None, 0, 4, 5, 1),
    "matmul": (torch.matmul, [(2, 3, 4), (4, 5)], 0, 1, None, 0, 4, 5, 1),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 1, 2, 0, 1, 4, 5, 1),
    "conv1d": (F.conv1d, [(2, 4, 5), (6, 4, 3), (6,)], 0, 1, 2, 1, 4, 6, 3),
    "grouped conv2d": (lambda x, w: F.conv2d(x, w, groups=2), [(2, 4, 5, 5), (6, 2, 3, 3)], 0, 1, None, 1, 2, 6, 9),
    "transposed": (F.conv_transpose1d, [(2, 4, 5), (4, 6, 3)], 0, 1, None, 0, 4, 6, 3),
}


def the_call(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> tuple[torch.fx.Node, list[str]]:
    program = toy_program(Applied(function), [torch.zeros(shape) for shape in shapes])
    (node,) = (node for node in program.graph.nodes if node.op == "call_function")
    return node, [entry.placeholder for entry in program.inputs]


@pytest.mark.parametrize("name", CASES)
def test_factors_and_sizes_of_every_form(name: str) -> None:
    function, shapes, source, weight, bias, axis, inside, outside, kernel = CASES[name]
    node, inputs = the_call(function, shapes)
    gemm = gemm_of(node)
    assert isinstance(gemm, Gemm) and multiplies(node)
    assert (gemm.input.name, gemm.weight.name) == (inputs[source], inputs[weight])
    assert (gemm.bias.name if gemm.bias is not None else None) == (inputs[bias] if bias is not None else None)
    assert (gemm.axis, gemm.in_features, gemm.out_features, gemm.kernel) == (axis, inside, outside, kernel)
    assert gemm.is_transposed == (name == "transposed")


def test_an_equation_multiplies_in_no_known_form() -> None:
    node, _ = the_call(lambda x, y: torch.einsum("ij,jk->ik", x, y), [(3, 4), (4, 5)])
    assert gemm_of(node) is None and multiplies(node)


def test_attention_and_arithmetic_are_no_gemms() -> None:
    for function in (lambda x, y: F.scaled_dot_product_attention(x, y, y), torch.add):
        node, _ = the_call(function, [(1, 2, 3, 4), (1, 2, 3, 4)])
        assert gemm_of(node) is None and not multiplies(node)
