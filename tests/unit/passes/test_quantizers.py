"""Quantizers of others: what they are given, what is asked of them, and GPTQ as the example writes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.verify_masks import verify_masks
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantization.round_to_nearest import RoundToNearest
from compile_sparse.passes.quantize import Quantize
from compile_sparse.passes.statistics.gram import Gram, each_gram
from tests.installing import install
from tests.support.contexts import context as any_context
from tests.support.contexts import target
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Fed, Linear

ALL = target(tuple(SCHEMES))
TEXT = CalibrationStream(tuple(tuple(range(3 + n, 90, 2 + n % 3)) for n in range(8)))


def example() -> type[Quantizer]:
    path = Path(__file__).parents[3] / "examples" / "gptq_quantizer.py"
    spec = importlib.util.spec_from_file_location("gptq_quantizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Quantizer] = module.Gptq
    return found


@pytest.fixture(autouse=True)
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "compile_sparse.quantizers", {"gptq": example()})


context = partial(any_context, calibration=TEXT, goal=ALL)


def quantized(program: Program, given: PassContext, **options: Any) -> Program:
    result = Quantize(**options).run(program, given)
    verify_program(result.program)
    return result.program


def restored(program: Program, tensor: str) -> torch.Tensor:
    """The weight as the program multiplies with it."""
    codes = next(name for name, bound in program.bindings.items() if bound.tensor == f"{tensor}.codes")
    node = next(user for place in program.graph.nodes if place.name == codes for user in place.users)
    parts = {arg: program.weights.load(program.bindings[arg.name].tensor) for arg in node.all_input_nodes}
    value: torch.Tensor = node.target(*[parts.get(arg, arg) for arg in node.args])
    return value


def output_errors(program: Program, quantized: Program, grams: dict[str, Gram]) -> dict[str, float]:
    """Mean squared error of each layer's output, on its inputs in the dense model."""
    found = {}
    for linear in find_linears(program)[0]:
        lost = (program.weights.load(linear.tensor) - restored(quantized, linear.tensor)).double()
        rows = lost if linear.axis == 1 else lost.t()
        found[linear.node.name] = float((rows @ grams[linear.input.name].moment * rows).sum())
    return found


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a16-g32", "w4a16-g32-asym", "w4a16-channel", "fp8", "fp8-block", "nvfp4"]
)
def test_gptq_lowers_the_error_of_outputs(tiny_llama_program: Program, scheme: str) -> None:
    """Of every layer, and by a third in all."""
    names = [linear.input.name for linear in find_linears(tiny_llama_program)[0]]
    grams = dict(each_gram(tiny_llama_program, names, TEXT, SilentProgress()))
    plain, compensated = (
        output_errors(
            tiny_llama_program, quantized(tiny_llama_program, context(), scheme=scheme, quantizer=name), grams
        )
        for name in ("rtn", "gptq")
    )
    assert all(compensated[name] < plain[name] for name in plain)
    assert sum(compensated.values()) < 0.7 * sum(plain.values())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "fp8", "nvfp4"])
@pytest.mark.parametrize("form", [Linear, AddMM])
def test_a_sparsity_pattern_stays(scheme: str, form: type[Linear] | type[AddMM]) -> None:
    generator = torch.Generator().manual_seed(0)
    text = Fed((), inputs=(torch.randn(40, 64, generator=generator),))
    dense = toy_program(form(torch.randn(24, 64, generator=generator)), [torch.zeros(3, 64)])
    sparse = Sparsify(pattern="2:4").run(dense, context(calibration=text)).program
    made = quantized(sparse, context(calibration=text), scheme=scheme, quantizer="gptq")
    verify_masks(made, before=sparse)
    assert not restored(made, "weight")[sparse.weights.load("weight") == 0].any()


def test_the_program_computes_with_what_the_quantizer_made(tiny_gpt2_program: Program) -> None:
    made = quantized(tiny_gpt2_program, context(), scheme="w8a16", quantizer="gptq")
    inputs = next(iter(TEXT.feeds(tiny_gpt2_program)))
    wanted, got = (Executor(program).run(inputs)["logits"] for program in (tiny_gpt2_program, made))
    assert 0 < float((wanted - got).abs().max()) < 0.1 * float(wanted.std())


class Recording(RoundToNearest):
    """Round-to-nearest that remembers what it was given."""

    name: ClassVar[str] = "recording"
    needs_statistics: ClassVar[bool] = True
    given: ClassVar[list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]]

    def quantize(self, rows: Any, grid: Any, *, statistics: Any, zeros: Any) -> Any:
        self.given.append((rows, statistics, zeros))
        return super().quantize(rows, grid, statistics=statistics, zeros=zeros)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    Recording.given = []
    install(monkeypatch, "compile_sparse.quantizers", {"recording": Recording})
    return Recording


class Twice(torch.nn.Module):
    """One weight with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = torch.nn.functional.linear(x, self.weight)
        return torch.nn.functional.linear(once.relu(), self.weight)


def test_a_shared_weight_is_quantized_once_for_all_its_inputs(recording: type[Recording]) -> None:
    module, x = Twice(), torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    quantized(
        toy_program(module, [x]), context(calibration=Fed((), inputs=(x,))), scheme="w8a16", quantizer="recording"
    )
    ((rows, statistics, zeros),) = recording.given
    second = (x @ module.weight.detach().t()).relu()
    both = torch.cat([x, second]).double()
    assert torch.equal(rows, module.weight.detach()) and zeros is None
    torch.testing.assert_close(statistics, both.t() @ both / 60, rtol=1e-6, atol=1e-6)


def test_round_to_nearest_takes_the_diagonal_of_whole_statistics(
    recording: type[Recording], tiny_llama_program: Program
) -> None:
    plain, same = (
        quantized(tiny_llama_program, context(), scheme="w4a16-g32", quantizer=name) for name in ("rtn", "recording")
    )
    assert set(plain.weights) == set(same.weights)
    assert all(torch.equal(plain.weights.load(name), same.weights.load(name)) for name in plain.weights)
    assert len(recording.given) == len(find_linears(tiny_llama_program)[0])


def test_planning_computes_nothing(recording: type[Recording], tiny_llama_program: Program) -> None:
    results = [
        Quantize(scheme="nvfp4", quantizer=name).run(tiny_llama_program, context(calibration=None, plan_only=True))
        for name in ("rtn", "recording")
    ]
    assert not recording.given
    assert results[0].achieved == results[1].achieved
    shapes = [{n: (r.program.weights[n].shape, r.program.weights[n].dtype) for n in r.program.weights} for r in results]
    assert shapes[0] == shapes[1]


def test_without_text_it_is_refused(tiny_llama_program: Program) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(scheme="w4a16", quantizer="gptq").run(tiny_llama_program, context(calibration=None))
    assert (caught.value.code, caught.value.where) == ("CS1121", "--quantizer")


def shorter(codes: torch.Tensor) -> torch.Tensor:
    return codes[1:]


def wider(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.int32)


def filled(codes: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(codes)


@pytest.mark.parametrize(("wrong", "part"), [(shorter, "the format is"), (wider, "int32"), (filled, "must stay zero")])
def test_what_breaks_the_contract_is_named(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], torch.Tensor], part: str
) -> None:
    class Wrong(RoundToNearest):
        name: ClassVar[str] = "wrong"

        def quantize(self, rows: Any, grid: Any, *, statistics: Any, zeros: Any) -> Any:
            return wrong(grid.codes(rows)), grid

    install(monkeypatch, "compile_sparse.quantizers", {"wrong": Wrong})
    dense = toy_program(Linear(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))), [torch.zeros(3, 8)])
    program = Sparsify(pattern="2:4").run(dense, context(calibration=None)).program if wrong is filled else dense
    made = Quantize(scheme="w8a16", quantizer="wrong").run(program, context(calibration=None)).program
    with pytest.raises(EnvironmentFailure) as caught:
        made.weights.load("weight.codes")
    assert caught.value.code == "CS5013" and caught.value.where == "weight"
    assert "'wrong'" in caught.value.what and part in caught.value.why
