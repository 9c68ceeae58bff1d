"""``find_contractions``: which weights, along which dimension, from which inputs; and what is left alone with a reason."""

from __future__ import annotations

import torch

from compile_sparse.compiler.ir.contractions import find_contractions
from compile_sparse.compiler.ir.program import Program
from tests.toys import ConvNet, toy_program


class Products(torch.nn.Module):
    """One of each form; ``shared`` is read twice, ``both`` along both of its dimensions, ``added`` in another way too."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name in ("linear", "addmm", "matmul", "shared", "both", "added"):
            setattr(self, name, torch.nn.Parameter(torch.randn(8, 8, generator=draw)))
        self.bias = torch.nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.nn.functional.linear(x, self.linear)
        b = torch.addmm(self.bias, a, self.addmm) @ self.matmul
        c = torch.nn.functional.linear(torch.nn.functional.linear(b, self.shared), self.shared)
        d = torch.nn.functional.linear(c, self.both) @ self.both
        return torch.nn.functional.linear(d, self.added) + self.added.sum()


def test_every_form_of_product_names_its_own_axis() -> None:
    found, skips = find_contractions(toy_program(Products(), [torch.zeros(3, 8)]))
    assert [(each.tensor, each.axis, len(each.nodes)) for each in found] == [
        ("linear", 1, 1),
        ("addmm", 0, 1),
        ("matmul", 0, 1),
        ("shared", 1, 2),
    ]
    assert {(skip.where, skip.code) for skip in skips} == {("both", "CS2204"), ("added", "CS2204")}
    assert found[0].inputs[0].op == "placeholder"
    assert found[3].inputs[1] is found[3].nodes[0], "the second use reads what the first gives"


def test_convolutions_contract_their_input_channels() -> None:
    found, skips = find_contractions(toy_program(ConvNet(), [torch.zeros(2, 3, 8, 8)]))
    assert [(each.tensor, each.axis, each.in_features, each.out_features, each.input_dim) for each in found] == [
        ("stem.weight", 1, 3, 16, -3),
        ("inner.weight", 1, 16, 10, -3),
        ("outer.weight", 1, 10, 16, -3),
        ("head.weight", 1, 56, 5, -1),
    ]
    for each in found:
        assert each.inputs[0].meta["val"].shape[each.input_dim] == each.in_features
    reasons = {skip.where: skip.why for skip in skips}
    assert reasons.keys() == {"depthwise.weight", "grouped.weight", "transposed.weight"}
    assert "10 groups" in reasons["depthwise.weight"]
    assert "4 groups" in reasons["grouped.weight"]
    assert "transposed" in reasons["transposed.weight"]


def test_the_kind_of_model_decides_the_axis(tiny_llama_program: Program, tiny_gpt2_program: Program) -> None:
    for program, axis in ((tiny_llama_program, 1), (tiny_gpt2_program, 0)):
        found, _ = find_contractions(program)
        assert {each.axis for each in found if "lm_head" not in each.tensor} == {axis}
        for each in found:
            for node, source in zip(each.nodes, each.inputs, strict=True):
                assert source.meta["val"].shape[-1] == each.in_features
                assert node.meta["val"].shape[-1] == each.out_features
