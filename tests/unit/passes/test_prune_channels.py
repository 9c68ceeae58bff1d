"""``prune-channels``: amounts, scores, skips and refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.criteria.activation import activation_scores
from compile_sparse.passes.criteria.magnitude import magnitude_scores
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.pruning.groups import nearest_size
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.oracles import compare
from tests.support.contexts import context as any_context
from tests.toys import toy_program

WINDOWS = CalibrationStream(((5, 9, 12, 40, 3, 8), (7, 7, 20, 33, 90, 4), (11, 60, 2)))


context = partial(any_context, schemes=(), changes={"alignment": 8})


def test_requested_and_achieved(tiny_llama_program: Program) -> None:
    result = PruneChannels(fraction=0.25).run(tiny_llama_program, context())
    assert result.modified
    assert result.requested == {"fraction": 0.25, "criterion": None}
    assert result.achieved["groups"] == 2
    assert result.achieved["channels"] == {
        "before": 176,
        "after": 128,
        "sizes": [64],
    }  # 66 wanted of 88, 64 is the nearest multiple of 8
    assert result.achieved["fraction"] == pytest.approx(24 / 88)
    removed = 2 * 3 * 24 * 64  # layers, projections, channels, width
    parameters = result.achieved["parameters"]
    assert parameters["before"] - parameters["after"] == removed
    assert result.program.parameter_count() == parameters["after"]
    assert "64 is the nearest multiple of 8" in result.notes[0]
    assert not result.diagnostics


def test_input_program_is_untouched_and_result_runs(tiny_llama_program: Program) -> None:
    before = str(tiny_llama_program.graph)
    result = PruneChannels(fraction=0.5).run(tiny_llama_program, context(changes={"alignment": 1}))
    assert str(tiny_llama_program.graph) == before
    inputs = example_inputs(tiny_llama_program, 2, 4)
    assert Executor(result.program).run(inputs)["logits"].shape == (2, 4, 96)


def test_magnitude_equals_the_formula_written_out(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    group = analysis.prunable("channels")[0]
    score = magnitude_scores(analysis, [group], SilentProgress())[group.leaf]
    weights = tiny_llama_program.weights
    layer = group.anchor.tensor.rsplit(".", 2)[0]
    gate, up, down = (weights.load(f"{layer}.{part}_proj.weight").double() for part in ("gate", "up", "down"))
    wanted = (gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt()
    torch.testing.assert_close(score, wanted)


def _observed(program: Program, window: tuple[int, ...], node: str) -> torch.Tensor:
    """Rows of one node's value on one window."""
    rows: list[torch.Tensor] = []
    inputs = decoder_inputs(program, torch.tensor([window]))
    Executor(program).run(inputs, observe={node: lambda value: rows.append(value.flatten(0, -2))})
    return torch.cat(rows)


def test_activation_equals_an_observation_written_out(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    groups = analysis.prunable("channels")
    scores = activation_scores(analysis, groups, WINDOWS, SilentProgress())
    for group in groups:
        (consumer,) = group.consumers
        assert consumer.weight.endswith("down_proj.weight")
        seen = [_observed(tiny_llama_program, window, consumer.operand) for window in WINDOWS.windows]
        wanted = torch.cat(seen).double().square().mean(0).sqrt()
        # Batched and single runs round float32 products differently.
        torch.testing.assert_close(scores[group.leaf], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("criterion", ["magnitude", "activation"])
def test_the_best_channels_stay(tiny_llama_program: Program, criterion: str) -> None:
    calibration = WINDOWS if criterion == "activation" else None
    analysis = analyse(tiny_llama_program)
    groups = analysis.prunable("channels")
    if calibration is None:
        scores = magnitude_scores(analysis, groups, SilentProgress())
    else:
        scores = activation_scores(analysis, groups, calibration, SilentProgress())
    chosen = PruneChannels(fraction=0.25, criterion=criterion, compensation="none")
    result = chosen.run(tiny_llama_program, context(calibration=calibration))
    for group in groups:
        best = scores[group.leaf].argsort(descending=True)[:64].sort()[0]
        name, dim = group.members[0]
        dense = tiny_llama_program.weights.load(name).index_select(dim, best)
        assert torch.equal(result.program.weights.load(name), dense)
    keep = {}
    for group in groups:
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[scores[group.leaf].argsort(descending=True)[:64]] = True
        keep[group.anchor] = mask
    report = compare(result.program, analysis, keep, example_inputs(tiny_llama_program, 2, 5))
    assert report.holds, report


def test_planning_reads_no_weights(tiny_llama_program: Program) -> None:
    absent = {n: AbsentTensor(s.shape, s.dtype, n) for n, s in tiny_llama_program.weights.items()}
    planned = Program(**{**vars(tiny_llama_program), "weights": WeightStore(absent)})
    result = PruneChannels(fraction=0.25).run(planned, context(plan_only=True))
    real = PruneChannels(fraction=0.25).run(tiny_llama_program, context())
    assert result.achieved == real.achieved
    assert not result.program.weights.has_values
    assert result.program.weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 64)


def test_no_aligned_width_is_refused_with_the_arithmetic(tiny_llama_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneChannels(fraction=0.25).run(tiny_llama_program, context(changes={"alignment": 128}))
    assert caught.value.code == "CS2105"
    assert "no multiple of 128 is below 88" in caught.value.why


def test_activation_without_text_is_a_usage_error(tiny_llama_program: Program) -> None:
    with pytest.raises(UsageError) as caught:
        PruneChannels(fraction=0.25, criterion="activation").run(tiny_llama_program, context())
    assert caught.value.code == "CS1121"


class TwoBlocks(torch.nn.Module):
    """The first block's channels are rolled, the second's are free."""

    def __init__(self, roll_second: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in ((8, 16), (16, 8), (8, 16), (16, 8)))
        self.roll_second = roll_second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.layer_norm(self.layers[1](self.layers[0](x).relu().roll(1, -1)), (8,))
        y = self.layers[2](x).relu()
        out = self.layers[3](y.roll(1, -1) if self.roll_second else y)
        assert isinstance(out, torch.Tensor)
        return out


def test_frozen_groups_are_skipped_with_the_cause() -> None:
    program = toy_program(TwoBlocks(False), [torch.zeros(2, 8)])
    result = PruneChannels(fraction=0.5).run(program, context())
    assert result.achieved["channels"] == {"before": 16, "after": 8, "sizes": [8]}
    causes = [skip.why for skip in result.diagnostics]
    assert [skip.code for skip in result.diagnostics] == ["CS2104", "CS2104"]
    assert any("op 'roll' depends on positions" in why for why in causes)
    assert any("model input 'x0' has a fixed shape" in why for why in causes)


def test_when_everything_is_frozen_the_causes_are_the_error() -> None:
    program = toy_program(TwoBlocks(True), [torch.zeros(2, 8)])
    with pytest.raises(ModelError) as caught:
        PruneChannels(fraction=0.5).run(program, context())
    assert caught.value.code == "CS2104"
    assert caught.value.exit_code == 4
    assert "op 'roll' depends on positions" in caught.value.why


class Shuffled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu().view(-1, 8, 8).transpose(1, 2).reshape(x.shape[0], 64)
        out = self.down(hidden)
        assert isinstance(out, torch.Tensor)
        return out


def test_a_grid_of_channels_loses_one_side_only() -> None:
    result = PruneChannels(fraction=0.5).run(
        toy_program(Shuffled(), [torch.zeros(2, 8)]), context(changes={"alignment": 1})
    )
    assert result.achieved["channels"] == {"before": 8, "after": 4, "sizes": [4]}
    assert [skip.code for skip in result.diagnostics if "grid" in skip.why] == ["CS2109"]


@given(st.integers(2, 4096), st.floats(0.001, 0.999), st.sampled_from([1, 8, 16, 64]))
def test_kept_size_is_the_nearest_aligned_one(size: int, fraction: float, alignment: int) -> None:
    kept = nearest_size(size, fraction, alignment)
    wanted = size * (1.0 - fraction)
    candidates = range(0, size, alignment)  # 0 stands for a refusal
    nearest = min(abs(c - wanted) for c in candidates)
    assert abs((kept or 0) - wanted) <= nearest + 1e-9
    assert kept is None or kept in candidates


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_fraction_is_between_zero_and_one(fraction: float) -> None:
    with pytest.raises(ValidationError):
        PruneChannels(fraction=fraction)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValidationError):
        PruneChannels(fraction=0.5, ratio=0.5)  # type: ignore[call-arg]
