"""Finding residual branches: in every kind of model, and not where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.residual.branches import find_blocks, find_branches
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.testing.encoders import ENCODERS
from tests.toys import toy_program

WIDTH = 8
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
ATTENTION_FIRST = ["llama", "qwen3", "gpt2", "opt", "gemma2", "mixtral", "bert", "vit", "phi", "gptj"]


@pytest.mark.parametrize("name", [*ATTENTION_FIRST, "gpt_neox"])
def test_two_branches_a_block(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    branches = find_branches(program)
    kinds = ["mlp", "attention"] if name == "gpt_neox" else ["attention", "mlp"]  # in the order of the sum
    assert [(b.layer, b.kind) for b in branches] == [(layer, kind) for layer in range(2) for kind in kinds]
    cached = program.kind == "decoder"
    assert [b.caches for b in branches if b.kind == "attention"] == ([(0,), (1,)] if cached else [(), ()])
    assert all(not b.caches for b in branches if b.kind == "mlp")
    for before, after in zip(find_blocks(program), find_blocks(program)[1:], strict=False):
        assert before.end == after.start


def test_weights_are_those_of_the_module(captured: Callable[[str], Program]) -> None:
    attention, mlp = find_branches(captured("llama"))[2:]
    assert set(attention.weights) == {
        "model.layers.1.input_layernorm.weight",
        *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"),
    }
    assert set(mlp.weights) == {
        "model.layers.1.post_attention_layernorm.weight",
        *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_a_norm_that_parallel_branches_share_belongs_to_neither(captured: Callable[[str], Program]) -> None:
    program = captured("phi")
    attention, mlp = find_branches(program)[:2]
    assert attention.add == mlp.add
    assert attention.skip == mlp.skip
    assert "model.layers.0.input_layernorm.weight" not in (*attention.weights, *mlp.weights)
    one = drop_branches(program, [attention]).program
    both = drop_branches(program, [attention, mlp]).program
    assert "model.layers.0.input_layernorm.weight" in one.weights
    assert "model.layers.0.input_layernorm.weight" not in both.weights


def test_a_post_norm_block_ends_behind_its_norm(captured: Callable[[str], Program]) -> None:
    program = captured("bert")
    for block in find_blocks(program):
        assert "layer_norm" in program.node(block.end).name
        assert block.end != block.branches[-1].add


def test_what_lies_between_stages_belongs_to_no_block() -> None:
    """Swin halves the image between its stages; the weights that do it survive the blocks on both sides."""
    program = capture_model(ENCODERS["swin"]().eval())
    branches = find_branches(program)
    assert [(b.layer, b.kind) for b in branches] == [(i, kind) for i in range(3) for kind in ("attention", "mlp")]
    first, second, third = find_blocks(program)
    assert first.end == second.start
    assert second.end != third.start
    left = drop_branches(program, (*second.branches, *third.branches)).program
    assert any("downsample.reduction" in name for name in left.weights)
    verify_program(left)


def test_convolutional_blocks_are_branches_of_another_kind() -> None:
    assert [b.kind for b in find_branches(capture_model(ENCODERS["convnext"]().eval()))] == ["other"] * 3


class Toy(nn.Module):
    """``rule(self, x)`` with two square linear layers, a convolution and a vector at hand."""

    def __init__(self, rule: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.rule = rule

    def forward(self, x: torch.Tensor) -> Any:
        return self.rule(self, x)


def _used_elsewhere(m: Any, x: torch.Tensor) -> Any:
    inner = m.a(x)
    return x + m.b(inner.relu()), inner


def _softmax_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.matmul((m.a(x) @ m.b(x).t()).softmax(-1).clone(), m.c(x))


FOUND: dict[str, tuple[Callable[[Any, torch.Tensor], Any], list[str]]] = {
    "skip first": (lambda m, x: x + m.a(x), ["mlp"]),
    "skip second": (lambda m, x: m.a(x) + x, ["mlp"]),
    "scaled branch": (lambda m, x: x + m.scale * m.b(m.a(x).relu()), ["mlp"]),
    "alpha of one": (lambda m, x: torch.add(x, m.a(x), alpha=1), ["mlp"]),
    "convolution": (lambda m, x: x + m.conv(x[:, None])[:, 0], ["other"]),
    "written-out attention": (_softmax_attention, ["attention"]),
    "router": (lambda m, x: x + m.a(x).softmax(-1) * m.b(x), ["mlp"]),
    "two terms": (lambda m, x: m.a(x.tanh()) + m.b(x) + x, ["mlp", "mlp"]),
    "stream between": (lambda m, x: (x + m.a(x)) + m.b(x), ["mlp", "mlp"]),
    "a constant beside it": (lambda m, x: m.scale.expand(3, WIDTH) + (x + m.a(x)), ["mlp"]),
    "nested": (lambda m, x: x + m.b((y := m.c(x)) + m.a(y).relu()), ["mlp"]),
}
NOT_FOUND: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "no product": lambda m, x: x + m.scale * x.tanh(),
    "difference": lambda m, x: x - m.a(x),
    "alpha of two": lambda m, x: torch.add(x, m.a(x), alpha=2),
    "broadcast": lambda m, x: x + m.a(x).mean(0, keepdim=True),
    "two projections": lambda m, x: m.b(x) + m.a(x),
    "doubled": lambda m, x: m.a(x) + m.a(x),
    "used elsewhere": _used_elsewhere,
    "branch is an output": lambda m, x: (x + (y := m.a(x)), y),
    "a number": lambda m, x: m.a(x) + 1.0,
}


@pytest.mark.parametrize("name", FOUND)
def test_sums_that_are_residual(name: str) -> None:
    rule, kinds = FOUND[name]
    program = toy_program(Toy(rule), [X])
    branches = find_branches(program)
    assert [b.kind for b in branches] == kinds
    for branch in branches:
        seen: dict[str, torch.Tensor] = {}
        watch = {key: partial(seen.__setitem__, key) for key in (branch.add, branch.output)}
        Executor(program).run({"x0": X}, observe=watch)
        without = Executor(drop_branches(program, [branch]).program).run({"x0": X})["y0"]
        # One rounding of sums of at most three terms below 10.
        torch.testing.assert_close(without, seen[branch.add] - seen[branch.output], rtol=0, atol=1e-5)
    if name != "a constant beside it":
        assert torch.equal(Executor(drop_branches(program, branches).program).run({"x0": X})["y0"], X)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_sums_that_are_not(name: str) -> None:
    assert find_branches(toy_program(Toy(NOT_FOUND[name]), [X])) == ()


def test_a_gated_expansion_is_one_branch_and_its_activation_none() -> None:
    """The tanh form of GELU adds a value to one computed from it; that is no stream."""
    rule = lambda m, x: x + m.b((y := m.a(x)) * 0.5 * (1 + torch.tanh(0.8 * (y + 0.04 * y**3))))  # noqa: E731
    (branch,) = find_branches(toy_program(Toy(rule), [X]))
    assert set(branch.weights) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_shared_weights_are_not_private() -> None:
    """The same block applied twice: each application can go, the weights stay until both have."""

    def rule(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + F.relu(m.a(x))
        return x

    program = replace(toy_program(Toy(rule), [X]), aliases={"tied.weight": "a.weight"})
    first, second = find_branches(program)
    assert first.weights == second.weights == ()
    assert (first.layer, second.layer) == (0, 1)
    once = drop_branches(program, [first]).program
    assert set(once.weights) == {"a.weight", "a.bias"}
    assert once.aliases == program.aliases
    twice = drop_branches(program, [first, second]).program
    assert not twice.weights
    assert not twice.aliases
