"""``prune-layers``: how many, which ones, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError

from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, WeightStore
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.branches import Branch, find_branches
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.compiler.residual.units import find_units
from compile_sparse.passes.criteria.block_influence import block_influence
from compile_sparse.passes.criteria.depth_ablation import MAX_WINDOWS, greedy_ablation
from compile_sparse.passes.prune_layers import PruneLayers
from tests.deep import DEPTH, deep_program
from tests.support.contexts import context as any_context
from tests.toys import toy_program

WINDOWS = CalibrationStream(((5, 9, 12, 40, 3, 8), (7, 7, 20, 33, 90, 4), (11, 60, 2)))


context = partial(any_context, calibration=WINDOWS)


def scaled(program: Program, branches: Sequence[Branch], factor: float) -> Program:
    """``program`` with the matrices that only ``branches`` read multiplied by ``factor``."""
    names = {name for b in branches for name in b.weights if len(program.weights[name].shape) == 2}
    values = {name: ResidentTensor(program.weights.load(name) * factor) for name in names}
    return replace(program, weights=program.weights.updated(values))


def idle(layer: int, kinds: Sequence[str] = ("attention", "mlp")) -> Program:
    """A Llama whose branches of ``layer`` add next to nothing."""
    program = deep_program("llama")
    chosen = [b for b in find_branches(program) if b.layer == layer and b.kind in kinds]
    return scaled(program, chosen, 1e-3)


def own_text(program: Program) -> CalibrationStream:
    """What ``program`` itself finds most likely: on this text a random model has something to lose."""
    ids = torch.tensor([[5, 9], [40, 7], [77, 3], [21, 60]])
    executor = Executor(program)
    for _ in range(10):
        ids = torch.cat([ids, executor.run(decoder_inputs(program, ids))["logits"][:, -1:].argmax(-1)], 1)
    return CalibrationStream(tuple(map(tuple, ids.tolist())))


def cross_entropy(program: Program) -> float:
    """Nats per predicted token, window by window."""
    total, count = 0.0, 0
    for window in WINDOWS.windows:
        ids = torch.tensor([window])
        logits = Executor(program).run(decoder_inputs(program, ids))["logits"]
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return total / count


@pytest.mark.parametrize("criterion", ["ablation", "block-influence"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_block_that_does_nothing_goes_first(criterion: str, layer: int) -> None:
    program = idle(layer)
    step = PruneLayers(fraction=0.25, criterion=criterion)  # type: ignore[arg-type]
    result = step.run(program, context(calibration=own_text(program)))
    assert result.modified
    assert result.achieved["removed"] == [layer]
    assert result.achieved["units"] == {"before": DEPTH, "after": DEPTH - 1}
    assert result.achieved["fraction"] == 0.25
    assert not any(f".layers.{layer}." in name for name in result.program.weights)
    parameters = result.achieved["parameters"]
    assert parameters["after"] == result.program.parameter_count()
    assert parameters["before"] == program.parameter_count()
    assert not result.notes


@pytest.mark.parametrize(("unit", "kind"), [("attention", "attention"), ("mlp", "mlp")])
@pytest.mark.parametrize("criterion", ["ablation", "block-influence"])
def test_branches_of_one_kind(unit: str, kind: str, criterion: str) -> None:
    program = idle(1, (kind,))
    step = PruneLayers(fraction=0.25, unit=unit, criterion=criterion)  # type: ignore[arg-type]
    result = step.run(program, context(calibration=own_text(program)))
    assert result.achieved["removed"] == [1]
    left = [(b.kind, b.caches) for b in find_branches(result.program)]
    assert sum(k == kind for k, _ in left) == DEPTH - 1
    assert len(left) == 2 * DEPTH - 1


def test_greedy_choice_equals_trying_every_candidate() -> None:
    program = deep_program("llama")
    units = find_units(program, "block")
    chosen, losses = greedy_ablation(program, units, 2, WINDOWS, SilentProgress())

    def loss(*gone: int) -> float:
        branches = [branch for index in gone for branch in units[index].branches]
        return cross_entropy(drop_branches(program, branches).program)

    first = min(range(DEPTH), key=loss)
    second = min((i for i in range(DEPTH) if i != first), key=lambda i: loss(first, i))
    assert [unit.layer for unit in chosen] == [first, second]
    # Batched and single windows round float32 logits (up to about 10) differently.
    assert losses == pytest.approx([loss(first), loss(first, second)], abs=1e-5)
    assert len({round(loss(*pair), 4) for pair in combinations(range(DEPTH), 2)}) > 1  # the candidates do differ


@pytest.mark.parametrize("kind", ["block", "attention", "mlp"])
def test_block_influence_written_out(kind: str) -> None:
    program = deep_program("llama")
    units = find_units(program, kind)  # type: ignore[arg-type]
    found = block_influence(program, units, WINDOWS, SilentProgress())
    for unit, value in zip(units, found, strict=True):
        cosines: list[torch.Tensor] = []
        for window in WINDOWS.windows:
            seen: dict[str, torch.Tensor] = {}
            names = (unit.branches[0].skip, unit.branches[-1].add)  # in a pre-norm model, the sums are the stream
            observe = {name: partial(seen.__setitem__, name) for name in names}
            Executor(program).run(decoder_inputs(program, torch.tensor([window])), observe=observe)
            x, y = (seen[name][0].double() for name in names)
            cosines.append((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)))
        assert value == pytest.approx(float(1 - torch.cat(cosines).mean()), abs=1e-6)


def test_encoders_are_judged_by_their_outputs() -> None:
    program = deep_program("bert")
    units = find_units(program, "block")
    (chosen,), (loss,) = greedy_ablation(program, units, 1, WINDOWS, SilentProgress())
    errors = []
    for unit in units:
        candidate = drop_branches(program, unit.branches).program
        error = size = 0.0
        for window in WINDOWS.windows:
            inputs = decoder_inputs(program, torch.tensor([window]))
            got, wanted = Executor(candidate).run(inputs), Executor(program).run(inputs)
            error += sum(float((got[k] - wanted[k]).square().sum()) for k in wanted)
            size += sum(float(wanted[k].square().sum()) for k in wanted)
        errors.append(error / size)
    assert errors[units.index(chosen)] == min(errors)
    assert loss == pytest.approx(min(errors), rel=1e-4)


def test_a_post_norm_block_ends_behind_its_norm() -> None:
    program = deep_program("bert")
    influence = block_influence(program, find_units(program, "block"), WINDOWS, SilentProgress())
    assert all(0 < value < 2 for value in influence)
    result = PruneLayers(fraction=0.25, criterion="block-influence").run(program, context())
    assert result.achieved["removed"] == [influence.index(min(influence))]
    assert not any(f".layer.{result.achieved['removed'][0]}." in name for name in result.program.weights)


def test_deepest_needs_no_text_and_keeps_the_last() -> None:
    result = PruneLayers(fraction=0.5, criterion="deepest").run(deep_program("llama"), context(calibration=None))
    assert result.achieved["removed"] == [1, 2]


def test_without_text_the_deepest_go_and_it_says_so() -> None:
    result = PruneLayers(fraction=0.5).run(deep_program("llama"), context(calibration=None))
    assert result.achieved["removed"] == [1, 2]
    assert "no calibration text" in result.notes[-1]


def test_planning_reads_no_weights_and_gives_the_same_sizes() -> None:
    program = deep_program("llama")
    absent = {n: AbsentTensor(s.shape, s.dtype, n) for n, s in program.weights.items()}
    planned = replace(program, weights=WeightStore(absent))
    result = PruneLayers(fraction=0.25).run(planned, context(plan_only=True))
    real = PruneLayers(fraction=0.25).run(program, context())
    assert result.achieved["parameters"] == real.achieved["parameters"]
    assert result.achieved["units"] == real.achieved["units"]
    assert "the plan counts the deepest" in result.notes[-1]


@pytest.mark.parametrize(("fraction", "removed"), [(0.13, 1), (0.3, 1), (0.375, 2), (0.6, 2), (0.7, 3)])
def test_the_nearest_whole_number_goes(fraction: float, removed: int) -> None:
    result = PruneLayers(fraction=fraction, criterion="deepest").run(deep_program("llama"), context(calibration=None))
    assert len(result.achieved["removed"]) == removed
    assert result.requested["fraction"] == fraction
    assert result.achieved["fraction"] == removed / DEPTH
    assert f"{fraction:g} of 4 blocks is {fraction * 4:g}; {removed} are removed." in result.notes


@pytest.mark.parametrize(
    ("fraction", "code", "arithmetic"),
    [
        (0.1, "CS2112", "0.1 of 4 blocks is 0.4, and the nearest whole number is 0"),
        (0.9, "CS2113", "0.9 of 4 blocks is 3.6, the nearest whole number is 4"),
    ],
)
def test_none_and_all_are_refused_with_the_arithmetic(fraction: float, code: str, arithmetic: str) -> None:
    with pytest.raises(ModelError) as caught:
        PruneLayers(fraction=fraction, criterion="deepest").run(deep_program("llama"), context(calibration=None))
    assert (caught.value.code, caught.value.exit_code) == (code, 4)
    assert arithmetic in caught.value.why


def test_a_model_without_residual_branches_is_refused() -> None:
    program = toy_program(torch.nn.Linear(8, 8), [torch.zeros(2, 8)])
    with pytest.raises(ModelError) as caught:
        PruneLayers(fraction=0.5, criterion="deepest").run(program, context(calibration=None))
    assert caught.value.code == "CS2114"


@pytest.mark.parametrize("criterion", ["ablation", "block-influence"])
def test_data_criteria_without_text_are_a_usage_error(criterion: str) -> None:
    with pytest.raises(UsageError) as caught:
        PruneLayers(fraction=0.5, criterion=criterion).run(deep_program("llama"), context(calibration=None))  # type: ignore[arg-type]
    assert caught.value.code == "CS1121"
    assert "deepest" in caught.value.hint


def test_the_result_is_a_legal_program() -> None:
    program = deep_program("llama")
    before = str(program.graph)
    steps = [PruneLayers(fraction=0.25), PruneLayers(fraction=0.34, unit="attention")]
    result, sections = run_passes(program, steps, context(), verify_each=True)  # type: ignore[arg-type]
    assert str(program.graph) == before
    assert [section.name for section in sections] == ["prune-layers"] * 2
    assert sum(entry.role == "past_key" for entry in result.inputs) == 2


def test_long_calibration_text_is_sampled_evenly() -> None:
    """The runs a candidate costs follow from the sample, not from the text."""
    program = deep_program("llama")
    long = CalibrationStream(tuple((i % 90 + 3, 5, 9) for i in range(5 * MAX_WINDOWS)), tokens_per_batch=3)
    short = CalibrationStream(long.windows[::5], tokens_per_batch=3)
    units = find_units(program, "block")[:2]
    sampled = greedy_ablation(program, units, 1, long, SilentProgress())
    assert sampled == greedy_ablation(program, units, 1, short, SilentProgress())


def test_every_candidate_is_reported() -> None:
    totals: list[int | None] = []

    class Counting(SilentProgress):
        def task(self, label, total=None):  # type: ignore[no-untyped-def]
            totals.append(total)
            return super().task(label, total)

    program = deep_program("llama")
    greedy_ablation(program, find_units(program, "block"), 2, WINDOWS, Counting())
    assert totals == [DEPTH + DEPTH - 1]


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.0}, {"fraction": 0.5, "unit": "head"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneLayers(**options)  # type: ignore[arg-type]
