"""Layers that a scheme would put too far off: told by their error, given what the target has, and said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.passes.quantization.layer_error import layer_error
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context, target
from tests.toys import toy_program
from tests.unit.passes.running import Fed

DEPTH, ROWS = 512, 40
STATIC = target(("w8a8-static",), fallbacks={"w8a8-static": ()})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layers(torch.nn.Module):
    """``plain`` reads ``x``; ``mild``, ``wild`` and ``beside`` (which share it) read it with one channel 25 or 1,000 times as
    large, which their weights undo.
    """

    def __init__(self) -> None:
        super().__init__()
        self.larger = torch.nn.ParameterDict()
        for seed, (name, factor) in enumerate({"plain": 1.0, "mild": 25.0, "wild": 1000.0, "beside": 1000.0}.items()):
            layer = torch.nn.Linear(DEPTH, ROWS, bias=False)
            layer.weight = torch.nn.Parameter(random(ROWS, DEPTH, seed=seed))
            layer.weight.data[:, 3] /= factor
            setattr(self, name, layer)
            gain = torch.ones(DEPTH)
            gain[3] = factor
            self.register_buffer(f"{name}_gain", gain)

    def forward(self, x: torch.Tensor) -> Any:
        shared = x * self.wild_gain
        return self.plain(x), self.mild(x * self.mild_gain), self.wild(shared), self.beside(shared) * 0.5


def inputs() -> torch.Tensor:
    made = random(32, DEPTH, seed=9)
    made[:, 3] = 1.0
    return made


def fed(goal: Any, **options: Any) -> PassContext:
    return context(Fed((), inputs=(inputs(),)), goal=goal, **options)


def run(goal: Any, scheme: str = "w8a8", **options: Any) -> tuple[Program, PassResult]:
    program = toy_program(Layers(), [torch.zeros(32, DEPTH)])
    result = Quantize(scheme=scheme, **options).run(program, fed(goal))  # type: ignore[arg-type]
    verify_program(result.program)
    return program, result


def formats(program: Program) -> dict[str, str]:
    """Layer -> ``int8`` or ``int8-static`` (activations too), ``weights`` or ``float``."""
    found = {}
    for node in program.graph.nodes:
        if op_name(node) != "linear":
            continue
        source, weight = node.args[:2]
        stored = program.tensor_of(weight.args[0] if op_name(weight) == "dequantize_weight" else weight)
        kind = "weights" if op_name(weight) == "dequantize_weight" else "float"
        found[str(stored).split(".")[0]] = source.args[1] if op_name(source) == "fake_quantize" else kind
    return found


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # The outlier takes the whole row's codes; in groups of 128 a fourth of the row's, and that is 0.5 for the wild ones.
        ({"grouped_inputs": "int8"}, {"plain": "int8", "mild": "weights", "wild": "float", "beside": "float"}),
        ({"grouped_inputs": "float"}, {"plain": "int8", "mild": "weights", "wild": "weights", "beside": "weights"}),
        ({"fallbacks": {"w8a8": ()}}, {"plain": "int8", "mild": "int8", "wild": "float", "beside": "float"}),
        ({"fallbacks": {}}, dict.fromkeys(("plain", "mild", "wild", "beside"), "int8")),
    ],
)
def test_a_layer_gets_the_fastest_format_that_is_near_enough(changes: dict[str, Any], wanted: dict[str, str]) -> None:
    program, result = run(target(**{"fallbacks": {"w8a8": ("w8a16",)}} | changes))
    assert formats(result.program) == wanted
    others = [name for name, kind in wanted.items() if kind != "int8"]
    assert [each.where for each in result.diagnostics] == [f"{name}.weight" for name in others]
    assert {each.code for each in result.diagnostics} <= {"CS2210"}
    for each in result.diagnostics:
        kind = wanted[each.where.split(".")[0]]
        assert ("It has w8a16" if kind == "weights" else "It stays in floating point.") in each.why
        assert "measured on calibration data" in each.why
    dense, found = (Executor(each).run({"x0": inputs()}) for each in (program, result.program))
    for place, name in enumerate(wanted):
        error = float((found[f"y{place}"] - dense[f"y{place}"]).norm() / dense[f"y{place}"].norm())
        assert (error < 0.1) == (name in ("plain", "mild") or wanted[name] != "int8")


def test_every_layer_has_the_scheme_if_asked_for() -> None:
    _, result = run(target(fallbacks={"w8a8": ("w8a16",)}), fallback="none")
    assert set(formats(result.program).values()) == {"int8"}
    assert not result.diagnostics and not result.notes


def test_a_plan_says_that_it_will_be_measured() -> None:
    program = toy_program(Layers(), [torch.zeros(32, DEPTH)])
    planned = Quantize(scheme="w8a8").run(program, fed(target(fallbacks={"w8a8": ("w8a16",)}), plan_only=True))
    assert "measured when compiling, get w8a16 or floating point" in planned.notes[0]
    assert set(formats(planned.program).values()) == {"int8"}


def test_a_fixed_scale_destroys_whoever_shares_the_input() -> None:
    """Two layers read the value with the outlier, and runtimes make one GEMM of them."""
    _, result = run(STATIC, "w8a8-static")
    assert formats(result.program) == {
        "plain": "int8-static",
        "mild": "int8-static",
        "wild": "float",
        "beside": "float",
    }
    assert "10% is the limit" in result.diagnostics[0].why
    assert result.achieved["linears"] == 2


def test_layers_in_floating_point_give_floats() -> None:
    entry = {"pattern": "2:4", "pays": True, "why": "Sparse tensor cores.", "int8_outputs": True}
    goal = target(("w8a8-static",), fallbacks={"w8a8-static": ()}, sparse_patterns=(entry,))
    _, result = run(goal, "w8a8-static", outputs="all")
    assert result.achieved["int8_outputs"] == 2
    scales = [name for name in result.program.weights if name.endswith("output_scale")]
    assert sorted(scales) == ["mild.weight.output_scale", "plain.weight.output_scale"]


class Spike(torch.nn.Module):
    """Two layers on one input, with biases; the first output of ``spiked`` is huge for a token that has features of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.spiked = torch.nn.Linear(DEPTH, ROWS), torch.nn.Linear(DEPTH, ROWS)
        for seed, layer in enumerate((self.plain, self.spiked)):
            layer.weight.data, layer.bias.data = random(ROWS, DEPTH, seed=seed), random(ROWS, seed=7)
        self.spiked.weight.data[0] = 0
        self.spiked.weight.data[0, : DEPTH // 2] = 100 * spiked_inputs()[0, : DEPTH // 2].sign()

    def forward(self, x: torch.Tensor) -> Any:
        return self.plain(x), self.spiked(x)


def spiked_inputs() -> torch.Tensor:
    made = random(32, DEPTH, seed=9)
    made[1:, : DEPTH // 2] = 0
    return made


def test_an_output_with_an_outlier_is_not_rounded() -> None:
    """One token's output is a thousand times as large as the others', whose codes would all be zero."""
    entry = {"pattern": "2:4", "pays": True, "why": "Sparse tensor cores.", "int8_outputs": True}
    goal = target(("w8a8-static",), fallbacks={"w8a8-static": ()}, sparse_patterns=(entry,))
    program = toy_program(Spike(), [torch.zeros(32, DEPTH)])
    fed_spikes = context(Fed((), inputs=(spiked_inputs(),)), goal=goal)
    result = Quantize(scheme="w8a8-static", outputs="all").run(program, fed_spikes)
    verify_program(result.program)
    assert set(formats(result.program).values()) == {"int8-static"}
    assert [name for name in result.program.weights if name.endswith("output_scale")] == ["plain.weight.output_scale"]
    (said,) = result.diagnostics
    assert said.where == "spiked.weight" and said.why.startswith("Rounded to int8, its output would be 9")
    both = Quantize(scheme="w8a8-static", outputs="all", fallback="none").run(program, fed_spikes)
    assert both.achieved["int8_outputs"] == 2
    found = Executor(both.program).run({"x0": spiked_inputs()})["y1"]
    dense = Executor(program).run({"x0": spiked_inputs()})["y1"]
    lost = ((found - dense).norm(dim=1) / dense.norm(dim=1)).mean()
    assert said.why.split("would be ")[1].startswith(f"{float(lost):.1%}")


def test_a_model_that_is_destroyed_altogether_is_refused() -> None:
    class Wild(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wild = Layers().wild

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wild(x)

    huge = inputs()
    huge[:, 3] = 1000.0
    program = toy_program(Wild(), [torch.zeros(32, DEPTH)])
    with pytest.raises(ModelError, match="CS2201") as caught:
        Quantize(scheme="w8a8").run(program, context(Fed((), inputs=(huge,)), goal=target(fallbacks={"w8a8": ()})))
    assert "too far" in caught.value.why or "would be" in caught.value.why


@pytest.mark.parametrize("planted", [False, True])
def test_random_ids_tell_outliers_without_text(tiny_llama_program: Program, planted: bool) -> None:
    program, factor = tiny_llama_program, 300.0
    if planted:
        linears, _ = find_linears(program)
        gate = next(each for each in linears if "gate_proj" in each.tensor)
        norm = gate.tensor.replace("mlp.gate_proj", "post_attention_layernorm")
        changed = {norm: program.weights.load(norm).clone()}
        changed[norm][3] *= factor
        for each in linears:
            if each.input is gate.input:
                changed[each.tensor] = program.weights.load(each.tensor).clone()
                changed[each.tensor][:, 3] /= factor
        sources = {name: ResidentTensor(value) for name, value in changed.items()}
        program = replace(program, weights=program.weights.updated(sources))
    result = Quantize(scheme="w8a8").run(program, context(goal=target(fallbacks={"w8a8": ("w8a16",)})))
    verify_program(result.program)
    assert "random token ids" in result.notes[0]
    wanted = ["gate_proj", "up_proj"] if planted else []
    assert [each.where.split(".")[-2] for each in result.diagnostics] == wanted


def test_packaged_text_is_measured_on_before_random_ids(tiny_llama_program: Program) -> None:
    sample = CalibrationStream((tuple(range(3, 67)),) * 2)
    result = Quantize(scheme="w8a8").run(
        tiny_llama_program, context(sample=sample, goal=target(fallbacks={"w8a8": ("w8a16",)}))
    )
    assert "on the packaged text" in result.notes[0]


# -- the error


def numpy_error(x: Any, weight: Any, groups: int, differences: bool) -> float:
    """The same from loops over tokens, in float64, for int8 activations."""
    scale = np.abs(weight).max(1) / 127
    rounded = np.rint(weight / scale[:, None]) * scale[:, None]
    pairs = []
    for token in x:
        used = token.copy()
        for start in range(0, len(token), groups or len(token)):
            part = token[start : start + (groups or len(token))]
            step = np.abs(part).max() / 127
            used[start : start + len(part)] = np.rint(part / step) * step
        exact, found = weight @ token, rounded @ used
        if differences:
            exact, found = exact - exact.mean(), found - found.mean()
        pairs.append((np.linalg.norm(found - exact), np.linalg.norm(exact)))
    floor = 0.1 * sorted(length for _, length in pairs)[(len(pairs) - 1) // 2]
    return float(np.mean([away / max(length, floor) for away, length in pairs]))


@pytest.mark.parametrize("differences", [False, True])
def test_the_error_is_the_mean_over_tokens(differences: bool) -> None:
    x, weight = random(20, 96, seed=1), random(30, 96, seed=2) + 0.5  # what logits have in common is no answer
    x[0] *= 1e-6
    x[5, 0] = 40.0
    found = layer_error(x, weight, SCHEMES["w8a8"], differences=differences)
    wanted = numpy_error(x.numpy().astype(np.float64), weight.numpy().astype(np.float64), 0, differences)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_one_huge_token_does_not_hide_the_others() -> None:
    """With a fixed scale for an outlier of one token the others round to nothing."""
    x = random(32, 96, seed=1)
    x[0] *= 3000
    weight = random(30, 96, seed=2)
    error = layer_error(x, weight, SCHEMES["w8a8-static"], peak=float(x.abs().max()))
    assert error > 0.9
    assert layer_error(x, weight, SCHEMES["w8a8"]) < 0.03
