"""Masks by Wanda, of convolutions, and only where a target says that they pay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.verify_masks import verify_masks
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.mask import Sparsify
from tests.support.contexts import context, target
from tests.toys import ConvNet, toy_program
from tests.unit.passes.masking import DEPTH, FORMS, ROWS, Form, fed, masked, rows, weight
from tests.unit.passes.running import Linear

# -- criteria that look at text


def driven() -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of inputs whose features differ in strength by a factor of thousands."""
    draw = torch.Generator().manual_seed(7)
    strength = torch.logspace(-2, 2, DEPTH)[torch.randperm(DEPTH, generator=draw)]
    return torch.randn(5, DEPTH, generator=draw) * strength, torch.randn(3, DEPTH, generator=draw) * strength


def wanda(pattern: str, form: Form = Linear) -> tuple[Program, np.ndarray]:
    """The masked program, and the scores ``|W[n, k]| ||x_k||`` in float64, ``[N, K]``."""
    program = toy_program(form(weight()), [torch.zeros(3, DEPTH)])
    result = Sparsify(pattern=pattern, criterion="wanda").run(program, fed(*driven())).program
    verify_program(result)
    verify_masks(result, before=program)
    norms = np.sqrt((torch.cat(driven()).double().numpy() ** 2).sum(0))
    return result, np.abs(weight().double().numpy()) * norms


@pytest.mark.parametrize("form", FORMS)
def test_wanda_keeps_the_largest_scores_of_every_run(form: Form) -> None:
    program, scores = wanda("2:4", form)
    kept, before = rows(program, form), weight().numpy()
    wanted = before.copy()
    for row, start in np.ndindex(ROWS, DEPTH // 4):
        part = slice(4 * start, 4 * start + 4)
        lowest = np.argsort(scores[row, part])[:2]
        wanted[row, part][lowest] = 0
    np.testing.assert_array_equal(kept, wanted)
    assert (kept != rows(masked("2:4", form), form)).any(), "magnitude alone must choose differently"


@pytest.mark.parametrize("form", FORMS)
def test_wanda_compares_within_each_output_row(form: Form) -> None:
    program, scores = wanda("0.3", form)
    kept, before = rows(program, form), weight().numpy()
    count = round(0.3 * DEPTH)
    for row in range(ROWS):
        wanted = before[row].copy()
        wanted[np.argsort(scores[row])[:count]] = 0
        np.testing.assert_array_equal(kept[row], wanted)
    assert program.masks["weight"] == SparsityMask("0.3", -1, ROWS * count / (ROWS * DEPTH))


@pytest.mark.parametrize("form", FORMS)
def test_wanda_sums_the_scores_of_a_block(form: Form) -> None:
    program, scores = wanda("block=4x8:0.5", form)
    stored = scores if form is Linear else scores.T
    sums = stored.reshape(stored.shape[0] // 4, 4, stored.shape[1] // 8, 8).sum((1, 3))
    gone = np.argsort(sums.flatten())[: sums.size // 2]
    value = program.weights.load("weight").numpy()
    zero = ~value.reshape(stored.shape[0] // 4, 4, stored.shape[1] // 8, 8).any((1, 3))
    assert set(np.flatnonzero(zero)) == set(gone)


def test_wanda_adds_up_what_all_layers_of_a_shared_weight_read() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(1)
            self.weight = torch.nn.Parameter(torch.randn(8, 8, generator=draw))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            linear = torch.nn.functional.linear
            return linear(linear(x, self.weight), self.weight)

    module = Twice()
    program = toy_program(module, [torch.zeros(3, 8)])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    result = Sparsify(pattern="0.5", criterion="wanda").run(program, fed(x)).program
    between = x.double() @ module.weight.double().T
    scores = (module.weight.double().abs() * (x.double().square().sum(0) + between.square().sum(0)).sqrt()).detach()
    zero = torch.zeros(8, 8, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :4], True)
    assert torch.equal(result.weights.load("weight") == 0, zero)


def test_wanda_needs_text_but_not_to_plan(tiny_gpt2_program: Program) -> None:
    with pytest.raises(UsageError) as caught:
        Sparsify(pattern="2:4", criterion="wanda").run(tiny_gpt2_program, fed())
    assert caught.value.code == "CS1121"
    planned = Sparsify(pattern="2:4", criterion="wanda").run(tiny_gpt2_program, fed(plan_only=True))
    by_magnitude = Sparsify(pattern="2:4").run(tiny_gpt2_program, context())
    assert planned.achieved == by_magnitude.achieved
    assert planned.program.masks == by_magnitude.program.masks
    assert planned.requested == {"pattern": "2:4", "criterion": "wanda"}
    assert not planned.program.weights.has_values


def test_wanda_on_a_language_model_follows_its_text(tiny_llama_program: Program) -> None:
    """Of one layer, the norms of its inputs as a direct run of the model gives them."""
    windows = tuple(tuple((5 * i + 3 * j) % 90 + 3 for j in range(8 + i % 2)) for i in range(4))
    text = CalibrationStream(windows)
    given = PassContext(target(), SilentProgress(), calibration=text)
    result = Sparsify(pattern="2:4", criterion="wanda").run(tiny_llama_program, given).program
    verify_masks(result, before=tiny_llama_program)
    tensor = "model.layers.1.mlp.down_proj.weight"
    (linear,) = [each for each in find_linears(tiny_llama_program)[0] if each.tensor == tensor]
    squares: list[torch.Tensor] = []
    for inputs in text.feeds(tiny_llama_program):
        watch = {linear.input.name: lambda x: squares.append(x.double().flatten(0, -2).square().sum(0))}
        Executor(tiny_llama_program).run(inputs, observe=watch)
    assert len(squares) == 2, "windows of two lengths"
    before = tiny_llama_program.weights.load(tensor)
    scores = (before.double().abs() * sum(squares).sqrt()).unflatten(1, (-1, 4))  # type: ignore[union-attr]
    keep = torch.zeros(scores.shape, dtype=torch.bool).scatter(2, scores.argsort(2)[..., 2:], True).flatten(1)
    assert torch.equal(result.weights.load(tensor), before * keep)


# -- convolutions


def test_a_convolution_follows_the_pattern_along_its_input_channels() -> None:
    program = toy_program(ConvNet(), [torch.zeros(2, 3, 8, 8)])
    result = Sparsify(pattern="2:4").run(program, context())
    verify_program(result.program)
    verify_masks(result.program, before=program)
    assert result.program.masks.keys() == {"inner.weight", "head.weight"}
    assert result.program.masks["inner.weight"].axis == 1
    before, after = (p.weights.load("inner.weight")[:, :, 0, 0].numpy() for p in (program, result.program))
    for old, new in zip(before.reshape(-1, 4), after.reshape(-1, 4), strict=True):
        wanted = old.copy()
        wanted[np.argsort(np.abs(old))[:2]] = 0
        np.testing.assert_array_equal(new, wanted)
    reasons = {skip.where: skip.why for skip in result.diagnostics}
    assert "3 is not a multiple of 4" in reasons["stem.weight"]
    assert "10 groups" in reasons["depthwise.weight"]
    plain = Sparsify(pattern="0.5").run(program, context())
    assert plain.program.masks.keys() == {"head.weight"}
    assert "only N:M" in next(skip.why for skip in plain.diagnostics if skip.where == "inner.weight")


def test_each_position_of_a_kernel_is_ranked_by_the_norm_of_its_channel() -> None:
    class Convolution(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.weight)

    module = Convolution(8, 4, 3, bias=False)
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 8)[:, None, None]
    program = toy_program(module, [torch.zeros(2, 8, 6, 6)])
    result = Sparsify(pattern="2:4", criterion="wanda").run(program, fed(x)).program
    before, after = (p.weights.load("weight").numpy() for p in (program, result))
    norms = np.sqrt((x.double().numpy() ** 2).sum((0, 2, 3)))
    for out, high, wide in np.ndindex(4, 3, 3):
        wanted = before[out, :, high, wide].copy()
        for start in (0, 4):
            part = slice(start, start + 4)
            wanted[part][np.argsort(np.abs(wanted[part]) * norms[part])[:2]] = 0
        np.testing.assert_array_equal(after[out, :, high, wide], wanted)


# -- what a target wants


def sparse_target(**rule: Any) -> Target:
    entry = {"pattern": "2:4", "pays": True, "why": "Sparse tensor cores.", **rule}
    return Target.model_validate({**target().model_dump(), "sparse_patterns": [entry]})


class Sizes(torch.nn.Module):
    """Linears of 32 to 64, 64 to 48 and 48 to 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = torch.nn.Linear(32, 64), torch.nn.Linear(64, 48), torch.nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.c(self.b(self.a(x).relu()).relu())
        assert isinstance(out, torch.Tensor)
        return out


@pytest.mark.parametrize(
    ("rule", "left", "parts"),
    [
        ({}, "abc", ()),
        ({"min_in_features": 48}, "bc", ("32 inputs", "from 48 inputs on")),
        ({"min_out_features": 40}, "ab", ("32 outputs", "from 40 outputs on")),
        ({"min_in_features": 48, "min_out_features": 40}, "b", ("from 48 inputs and 40 outputs on",)),
        ({"in_features_multiple": 32}, "ab", ("48 inputs", "in multiples of 32")),
        ({"out_features_multiple": 32}, "ac", ("48 outputs", "in multiples of 1, outputs of 32")),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_that_do_not_pay_stay_dense(
    rule: dict[str, int], left: str, parts: tuple[str, ...], transposed: bool
) -> None:
    module = TransposedSizes() if transposed else Sizes()
    program = toy_program(module, [torch.zeros(3, 32)])
    goal = sparse_target(**rule)
    result = Sparsify(pattern="2:4").run(program, fed(goal=goal))
    assert result.program.masks.keys() == {f"{name}.weight" for name in left}
    assert {(skip.where, skip.code) for skip in result.diagnostics} == {
        (f"{name}.weight", "CS2208") for name in "abc" if name not in left
    }
    for skip in result.diagnostics:
        assert goal.name in skip.why
    for part in parts:
        assert any(part in skip.why for skip in result.diagnostics), part
    for skip in result.diagnostics:
        assert result.program.weights[skip.where] is program.weights[skip.where]


class TransposedSizes(Sizes):
    """The same products from ``[K, N]`` weights."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.a, self.b, self.c):
            layer.weight.data = layer.weight.data.t().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.addmm(layer.bias, x, layer.weight).relu()
        return x


def test_a_rule_for_one_pattern_says_nothing_about_others() -> None:
    program = toy_program(Sizes(), [torch.zeros(3, 32)])
    result = Sparsify(pattern="1:4").run(program, fed(goal=sparse_target(min_in_features=1000)))
    assert len(result.program.masks) == 3


def test_when_nothing_pays_the_sizes_and_the_rule_are_told() -> None:
    program = toy_program(Sizes(), [torch.zeros(3, 32)])
    with pytest.raises(ModelError) as caught:
        Sparsify(pattern="2:4").run(program, fed(goal=sparse_target(min_in_features=256)))
    assert caught.value.code == "CS2203"
    assert "32 inputs and 64 outputs" in caught.value.why
    assert "from 256 inputs on" in caught.value.why
    assert "2 others" in caught.value.why
