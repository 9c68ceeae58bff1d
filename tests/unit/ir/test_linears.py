"""Matrix products with a stored weight are found in each of their spellings; the others are explained."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compile_sparse.compiler.ir.linears import find_linears, is_lm_head
from compile_sparse.compiler.ir.program import Program
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Linear


class Product(torch.nn.Module):
    """``function(x, W)`` with a trained ``W``."""

    def __init__(self, function: object, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        (Linear(torch.randn(6, 4)), 1),
        (AddMM(torch.randn(6, 4)), 0),
        (Product(torch.mm, 4, 6), 0),
        (Product(torch.matmul, 4, 6), 0),
    ],
)
def test_each_spelling_is_found_with_its_contraction(module: torch.nn.Module, axis: int) -> None:
    (linear,), skips = find_linears(toy_program(module, [torch.zeros(3, 4)]))
    assert not skips
    assert (linear.tensor, linear.axis) == ("weight", axis)
    assert linear.input.name == "x" or linear.input.op == "placeholder"
    assert linear.weight in linear.node.all_input_nodes


def test_a_computed_weight_is_skipped_with_the_reason() -> None:
    module = Product(lambda x, w: functional.linear(x, w.tanh()), 6, 4)
    found, (skip,) = find_linears(toy_program(module, [torch.zeros(3, 4)]))
    assert not found
    assert skip.code == "CS2202"
    assert "computed" in skip.why


def test_products_of_activations_and_stacks_of_matrices_are_no_linears() -> None:
    for module in (Product(lambda x, w: x @ x.t() + w, 3, 3), Product(lambda x, w: torch.matmul(x, w), 5, 4, 6)):
        found, _ = find_linears(toy_program(module, [torch.zeros(3, 4)]))
        assert not found


def test_a_buffer_is_no_trained_weight() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.table)  # type: ignore[arg-type]

    assert find_linears(toy_program(Fixed(), [torch.zeros(3, 4)]))[0] == []


def test_every_linear_of_a_llama_is_found_and_one_makes_the_logits(tiny_llama_program: Program) -> None:
    linears, skips = find_linears(tiny_llama_program)
    assert not skips
    assert len(linears) == 2 * 7 + 1
    last = [linear.tensor for linear in linears if is_lm_head(tiny_llama_program, linear.node)]
    assert last == ["lm_head.weight"]


def test_every_linear_of_a_gpt2_is_found_along_its_own_axis(tiny_gpt2_program: Program) -> None:
    linears, _ = find_linears(tiny_gpt2_program)
    assert len(linears) == 2 * 4 + 1
    logits = [linear for linear in linears if is_lm_head(tiny_gpt2_program, linear.node)]
    assert [linear.axis for linear in logits] == [1]
    assert {linear.axis for linear in linears if linear not in logits} == {0}
