"""Searched scales against a search written out element by element, and what they are for: less error of outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.linears import find_linears, is_lm_head
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, SchemeName, WeightFormat
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantization.calibrated import input_powers
from compile_sparse.passes.quantization.group_hint import OUTLIERS
from compile_sparse.passes.quantization.round_to_nearest import RoundToNearest
from compile_sparse.passes.quantization.scale_search import FACTORS, searched_grid, squared_errors
from compile_sparse.passes.quantization.scales import fitted_grid
from compile_sparse.passes.quantize import Quantize
from compile_sparse.passes.statistics.gram import each_gram
from tests.installing import install
from tests.support.contexts import context, target
from tests.toys import toy_program
from tests.unit.passes.running import Fed, Linear

ALL = target(tuple(SCHEMES))
TEXT = CalibrationStream(tuple(tuple(range(3 + n, 90, 2 + n % 3)) for n in range(8)))
FORMATS = [
    SCHEMES["w4a16-g32"].weights,
    SCHEMES["w4a16-asym"].weights,
    SCHEMES["w4a16-channel"].weights,
    SCHEMES["w8a16"].weights,
    replace(SCHEMES["w8a8"].weights, reduced_range=True),
]


def rows() -> torch.Tensor:
    """Heavy tails; no group divides it; a channel and a group are zero, another group is as small as floats are."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(7, 150, generator=generator) ** 3
    made[2] = 0.0
    made[4, 128:] = 0.0
    made[5, :128] *= 1e-38
    return made


def powers() -> torch.Tensor:
    return torch.rand(150, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4


def least_errors(weight: torch.Tensor, fmt: WeightFormat, stored: torch.dtype, power: torch.Tensor) -> torch.Tensor:
    """Smallest weighted squared error below each scale over all factors, in float64, one scale and one factor at a time."""
    grid = fitted_grid(weight, fmt, stored)
    bits, group = fmt.bits - fmt.reduced_range, fmt.group or weight.shape[1]
    low, high = -(2 ** (bits - 1)) + (0 if fmt.group else 1), 2 ** (bits - 1) - 1
    if not fmt.symmetric:
        low, high = 0, 2**bits - 1
    scales = grid.scale.reshape(len(weight), -1)
    zeros = torch.zeros_like(scales) if grid.zero_point is None else grid.zero_point.reshape(scales.shape).float()
    found = torch.full(scales.shape, torch.inf, dtype=torch.float64)
    for row in range(len(weight)):
        for place in range(scales.shape[1]):
            part = slice(place * group, (place + 1) * group)
            for factor in FACTORS:
                scale = float((scales[row, place] * factor).to(stored)) or 1.0
                codes = ((weight[row, part] / scale).round() + zeros[row, place]).clamp(low, high)
                error = ((codes - zeros[row, place]) * scale - weight[row, part]).double().square()
                found[row, place] = min(float(found[row, place]), float((error * power[part]).sum()))
    return found.reshape(grid.scale.shape)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_each_scale_is_the_best_of_all_factors(fmt: WeightFormat, stored: torch.dtype) -> None:
    weight, power = rows(), powers()
    plain = fitted_grid(weight, fmt, stored)
    found = searched_grid(weight, plain, power)
    errors = squared_errors(weight, found, power.float())
    # Sums of at most 150 products in float32.
    torch.testing.assert_close(errors.double(), least_errors(weight, fmt, stored, power), rtol=1e-4, atol=1e-30)
    assert bool((errors <= squared_errors(weight, plain, power.float())).all())
    assert bool((found.scale != plain.scale).any())
    assert torch.equal(found.scale, found.scale.to(stored).float()), "scales are what is stored"
    assert not found.values(found.codes(weight))[weight == 0].any()


def test_parts_of_a_weight_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fitted_grid(rows(), FORMATS[0], torch.float32)
    whole = searched_grid(rows(), plain, powers())
    monkeypatch.setattr("compile_sparse.passes.quantization.scale_search.ELEMENTS_AT_ONCE", 300)
    assert torch.equal(searched_grid(rows(), plain, powers()).scale, whole.scale)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g32", "w4a16-g32-asym", "w8a8", "w8a16"])
def test_text_lowers_the_weighted_error_of_every_layer(tiny_llama_program: Program, scheme: SchemeName) -> None:
    """With the inputs' mean squares as another way of summing them finds."""
    program = tiny_llama_program
    layers, _ = find_linears(program)
    grams = dict(each_gram(program, [layer.input.name for layer in layers], TEXT, SilentProgress()))
    plain, searched = (
        Quantize(scheme=scheme).run(program, context(calibration=text, goal=ALL)).program for text in (None, TEXT)
    )
    total = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for layer in layers:
        power = grams[layer.input.name].moment.diagonal()
        before, after = (weighted_error(program, each, layer.tensor, power) for each in (plain, searched))
        assert after <= before * (1 + 1e-6)
        head = is_lm_head(program, layer.node)  # it has 8 bits
        total[head] = [total[head][0] + before, total[head][1] + after]
    assert total[False][1] < (0.97 if scheme.startswith("w4") else 1.0) * total[False][0]


def weighted_error(dense: Program, quantized: Program, tensor: str, power: torch.Tensor) -> float:
    codes = next(name for name, bound in quantized.bindings.items() if bound.tensor == f"{tensor}.codes")
    node = next(user for place in quantized.graph.nodes if place.name == codes for user in place.users)
    given = [quantized.weights.load(quantized.bindings[a.name].tensor) if hasattr(a, "name") else a for a in node.args]
    lost = (node.target(*given) - dense.weights.load(tensor)).double().square()
    return float((lost * power).sum())


def test_mean_squares_are_those_of_the_inputs(tiny_llama_program: Program) -> None:
    layers, _ = find_linears(tiny_llama_program)
    grams = dict(each_gram(tiny_llama_program, [layer.input.name for layer in layers], TEXT, SilentProgress()))
    found = input_powers(tiny_llama_program, layers, TEXT, SilentProgress())
    for layer in layers:
        wanted = grams[layer.input.name].second.diagonal()
        torch.testing.assert_close(found[layer.tensor, layer.axis], wanted / wanted.mean(), rtol=1e-5, atol=1e-7)


def test_packaged_text_stands_in_for_calibration(tiny_llama_program: Program) -> None:
    def scales(**given: CalibrationStream) -> dict[str, torch.Tensor]:
        made = Quantize(scheme="w4a16").run(tiny_llama_program, context(goal=ALL, **given)).program
        return {name: made.weights.load(name) for name in made.weights if name.endswith(".scale")}

    calibrated, sampled, neither = scales(calibration=TEXT), scales(sample=TEXT), scales()
    assert all(torch.equal(scale, calibrated[name]) for name, scale in sampled.items())
    assert any(not torch.equal(scale, neither[name]) for name, scale in sampled.items())


def test_the_zeros_of_a_pattern_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    text = Fed((), inputs=(torch.randn(40, 64, generator=generator),))
    dense = toy_program(Linear(torch.randn(24, 64, generator=generator)), [torch.zeros(3, 64)])
    sparse = Sparsify(pattern="2:4").run(dense, context(calibration=text, goal=ALL)).program
    made = Quantize(scheme="w4a16-g32").run(sparse, context(calibration=text, goal=ALL)).program
    assert not made.weights.load("weight.codes")[sparse.weights.load("weight") == 0].any()


class Finer(RoundToNearest):
    """Gives scales that are no values of the type they are stored in."""

    name: ClassVar[str] = "finer"

    def quantize(self, rows: Any, grid: Any, *, statistics: Any, zeros: Any) -> Any:
        finer = replace(grid, scale=grid.scale * (1 + 2**-20))
        return finer.codes(rows), finer


def test_scales_that_cannot_be_stored_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "compile_sparse.quantizers", {"finer": Finer})
    program = toy_program(Linear(torch.randn(8, 64)), [torch.zeros(3, 64)])
    half = target(tuple(SCHEMES), baseline_precision="fp16")
    made = Quantize(scheme="w4a16", quantizer="finer").run(program, context(goal=half)).program
    with pytest.raises(EnvironmentFailure) as caught:
        made.weights.load("weight.scale")
    assert caught.value.code == "CS5013" and "float16" in caught.value.why


@pytest.mark.parametrize(("degrees", "said"), [(3.0, True), (1e6, False)])
def test_smaller_groups_are_recommended_where_outliers_decide(degrees: float, said: bool) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(degrees).sample((64, 1024))
    program = toy_program(Linear(weight), [torch.zeros(3, 1024)])

    def hints(scheme: SchemeName, goal: Any) -> list[str]:
        found = Quantize(scheme=scheme).run(program, context(goal=goal)).diagnostics
        return [each.hint for each in found if each.code == "CS2211"]

    assert hints("w4a16", ALL) == (["Choose w4a16-g32 for better quality."] if said else [])
    assert hints("w4a16-asym", ALL) == (["Choose w4a16-g32-asym for better quality."] if said else [])
    assert not hints("w4a16-g32", ALL)
    assert not hints("w4a16", target(("w4a16",))), "no scheme is named that the target lacks"
    assert OUTLIERS > 1.5, "weights without outliers gain 1.44"
