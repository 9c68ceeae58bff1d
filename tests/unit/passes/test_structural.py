"""The passes that remove positions of axes: amounts, choices, repair and refusals, on whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.criteria.ablation import ablation_scores
from compile_sparse.passes.criteria.depth_ablation import loss_measure
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_experts import PruneExperts
from compile_sparse.passes.prune_heads import PruneHeads
from compile_sparse.passes.prune_width import PruneWidth
from compile_sparse.passes.pruning.groups import eligible_groups, prunable_groups
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.support.contexts import context as any_context

GENERATOR = torch.Generator().manual_seed(2)
WINDOWS = CalibrationStream(tuple(tuple(torch.randint(3, 96, (16,), generator=GENERATOR).tolist()) for _ in range(16)))


context = partial(any_context, schemes=("w4a16-g32",), changes={"alignment": 8})


def logits(program: Program) -> torch.Tensor:
    return Executor(program).run(decoder_inputs(program, torch.tensor(WINDOWS.windows)))["logits"]


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (PruneHeads(fraction=0.25), {"before": 8, "after": 6, "sizes": [3]}),
        (PruneHeads(fraction=0.5, unit="query"), {"before": 4, "after": 2, "sizes": [1]}),
        (PruneWidth(fraction=0.25), {"before": 64, "after": 48, "sizes": [48]}),
    ],
)
def test_requested_and_achieved(tiny_llama_program: Program, made: Any, kept: dict[str, Any]) -> None:
    result = made.run(tiny_llama_program, context())
    assert result.achieved[made.noun] == kept
    assert result.achieved["criterion"] == "magnitude"
    assert result.achieved["compensation"] == "none"
    planned = made.run(tiny_llama_program, context(plan_only=True))
    assert planned.achieved == result.achieved
    assert result.program.parameter_count() == result.achieved["parameters"]["after"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize(
    "made", [PruneChannels(fraction=0.25), PruneHeads(fraction=0.25), PruneWidth(fraction=0.25)], ids=lambda m: m.name
)
def test_refitting_is_on_with_text_and_helps(captured: Callable[[str], Program], name: str, made: Any) -> None:
    dense = captured(name)
    result = made.run(dense, context(calibration=WINDOWS))
    assert result.achieved["criterion"] == "obs"
    plain = made.model_copy(update={"compensation": "none"}).run(dense, context(calibration=WINDOWS))
    wanted = logits(dense)
    lost = (logits(plain.program) - wanted).square().mean()
    if lost < 1e-4 * wanted.square().mean():  # channels that ReLU never lets through: there is nothing to repair
        assert (logits(result.program) - wanted).square().mean() <= 1.01 * lost
        return
    assert result.achieved["compensation"] == "least-squares"
    assert (logits(result.program) - wanted).square().mean() < lost


def test_a_dead_head_is_the_one_that_goes(tiny_llama_program: Program) -> None:
    """A key-value group whose output projection is zero costs nothing, and removing it changes nothing."""
    changes = {}
    for layer, dead in ((0, 2), (1, 0)):
        tensor = f"model.layers.{layer}.self_attn.o_proj.weight"
        value = tiny_llama_program.weights.load(tensor).clone()
        value[:, dead * 16 : (dead + 1) * 16] = 0.0
        changes[tensor] = ResidentTensor(value)
    dense = Program(**{**vars(tiny_llama_program), "weights": tiny_llama_program.weights.updated(changes)})
    result = PruneHeads(fraction=0.25, compensation="none").run(dense, context(calibration=WINDOWS))
    assert relative_error(logits(result.program), logits(dense)) <= tolerance(dense)


def test_every_key_head_may_lose_another_query_head(tiny_llama_program: Program) -> None:
    """Head size 8, two query heads per key head: the dead one differs from one key head to the next."""
    dead = {0: (0, 1, 1, 0), 1: (1, 1, 0, 1)}
    changes = {}
    for layer, places in dead.items():
        tensor = f"model.layers.{layer}.self_attn.o_proj.weight"
        value = tiny_llama_program.weights.load(tensor).clone().view(64, 4, 2, 8)
        for key_head, place in enumerate(places):
            value[:, key_head, place] = 0.0
        changes[tensor] = ResidentTensor(value.view(64, 64))
    dense = Program(**{**vars(tiny_llama_program), "weights": tiny_llama_program.weights.updated(changes)})
    result = PruneHeads(fraction=0.5, unit="query", compensation="none").run(dense, context(calibration=WINDOWS))
    assert relative_error(logits(result.program), logits(dense)) <= tolerance(dense)


def test_global_allocation_takes_from_the_layer_that_needs_least(tiny_llama_program: Program) -> None:
    """Layer 1's MLP hardly contributes: nearly everything that goes is taken there."""
    tensor = "model.layers.1.mlp.down_proj.weight"
    quiet = ResidentTensor(tiny_llama_program.weights.load(tensor) * 1e-4)
    dense = Program(**{**vars(tiny_llama_program), "weights": tiny_llama_program.weights.updated({tensor: quiet})})
    made = PruneChannels(fraction=0.25, allocation="global")
    result = made.run(dense, context(calibration=WINDOWS))
    widths = [result.program.weights[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(2)]
    assert widths[0] == 88
    assert widths[1] < 60
    assert result.achieved["fraction"] == pytest.approx(0.25, abs=8 / 176)
    uniform = PruneChannels(fraction=0.25).run(dense, context(calibration=WINDOWS))
    wanted = logits(dense)
    assert (logits(result.program) - wanted).square().mean() < (logits(uniform.program) - wanted).square().mean()


def test_sizes_fit_the_later_quantization_group(tiny_llama_program: Program) -> None:
    passes = [PruneChannels(fraction=0.3), Quantize(scheme="w4a16-g32")]
    assert passes[1].contraction_multiple == 32
    program, sections = run_passes(tiny_llama_program, passes, context(contraction_multiple=32))
    assert sections[0].achieved["channels"]["sizes"] == [64]  # of 88; 62 wanted, 64 = 2 groups of 32
    assert program.weights["model.layers.0.mlp.down_proj.weight.codes"].shape == (64, 64)


def test_a_group_that_is_far_from_what_was_asked_for_is_not_forced(tiny_llama_program: Program) -> None:
    result = PruneChannels(fraction=0.5).run(tiny_llama_program, context(contraction_multiple=128))
    assert result.achieved["channels"]["sizes"] == [48]
    assert any("groups of 128" in note for note in result.notes)


def test_heads_go_in_steps_that_keep_the_contraction_aligned(tiny_llama_program: Program) -> None:
    """A key-value group is 16 inputs of the output projection: with an alignment of 32 groups go in pairs."""
    result = PruneHeads(fraction=0.25).run(tiny_llama_program, context(changes={"alignment": 32}))
    assert result.achieved["heads"]["sizes"] == [2]
    assert any("3 of 4 positions were asked for" in note for note in result.notes)
    with pytest.raises(ModelError) as caught:
        PruneHeads(fraction=0.25).run(tiny_llama_program, context(changes={"alignment": 64}))
    assert caught.value.code == "CS2105"
    assert caught.value.exit_code == 4
    assert "4 positions (16 elements each)" in caught.value.why
    assert "no multiple of 4 is below 4" in caught.value.why


@pytest.mark.parametrize("made", [PruneHeads(fraction=0.99), PruneChannels(fraction=0.99)], ids=lambda m: m.name)
def test_a_fraction_that_leaves_nothing_is_refused_with_the_arithmetic(tiny_llama_program: Program, made: Any) -> None:
    with pytest.raises(ModelError) as caught:
        made.run(tiny_llama_program, context())
    assert caught.value.code == "CS2105"
    assert "the nearest is 0" in caught.value.why


def test_a_global_fraction_that_removes_nothing_is_refused(tiny_llama_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneChannels(fraction=0.001, allocation="global").run(tiny_llama_program, context(calibration=WINDOWS))
    assert caught.value.code == "CS2112"
    assert "0.001 of 176 is 0.176, and they go in steps of 8" in caught.value.why


def test_query_heads_ranked_over_all_layers(tiny_llama_program: Program) -> None:
    """One layer's query heads hardly matter: they go, equally many from each key head."""
    tensor = "model.layers.1.self_attn.o_proj.weight"
    quiet = ResidentTensor(tiny_llama_program.weights.load(tensor) * 1e-4)
    dense = Program(**{**vars(tiny_llama_program), "weights": tiny_llama_program.weights.updated({tensor: quiet})})
    made = PruneHeads(fraction=0.25, unit="query", allocation="global")
    result = made.run(dense, context(calibration=WINDOWS))
    assert result.program.weights["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert result.program.weights["model.layers.1.self_attn.q_proj.weight"].shape == (32, 64)


def test_ablation_finds_the_head_that_does_nothing(tiny_llama_program: Program) -> None:
    tensor = "model.layers.0.self_attn.o_proj.weight"
    value = tiny_llama_program.weights.load(tensor).clone()
    value[:, 32:48] = 0.0
    weights = tiny_llama_program.weights.updated({tensor: ResidentTensor(value)})
    dense = Program(**{**vars(tiny_llama_program), "weights": weights})
    analysis = analyse(dense)
    groups = [g for g in analysis.prunable("heads") if "broadcast" not in g.roles]
    scores = ablation_scores(analysis, groups, WINDOWS, SilentProgress())
    measure = loss_measure(dense, WINDOWS)
    wanted = []
    for head in range(4):
        silenced = value.clone()
        silenced[:, 16 * head : 16 * head + 16] = 0.0
        changed = dense.weights.updated({tensor: ResidentTensor(silenced)})
        wanted.append(measure(Program(**{**vars(dense), "weights": changed})) - measure(dense))
    assert wanted[2] == 0.0
    found = scores[groups[0].leaf]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def test_ablation_is_refused_where_it_would_take_too_long(
    tiny_llama_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compile_sparse.passes.criteria.ablation.MOST_POSITIONS", 100)
    with pytest.raises(UsageError) as caught:
        PruneChannels(fraction=0.25, criterion="ablation").run(tiny_llama_program, context(calibration=WINDOWS))
    assert caught.value.code == "CS1128"
    assert "176 positions" in caught.value.why


def test_a_bias_fit_without_biases_says_so(tiny_llama_program: Program) -> None:
    result = PruneChannels(fraction=0.25, compensation="bias").run(tiny_llama_program, context(calibration=WINDOWS))
    assert result.achieved["compensation"] == "none"
    assert [skip.code for skip in result.diagnostics] == ["CS2115"]


def test_headless_encoders_keep_their_width(tiny_bert_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneWidth(fraction=0.25).run(tiny_bert_program, context())
    assert caught.value.code == "CS2104"


def test_a_model_without_experts_says_so(tiny_llama_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneExperts(fraction=0.5).run(tiny_llama_program, context())
    assert caught.value.code == "CS2104"
    assert "no mixture-of-experts" in caught.value.why


def test_refitting_without_text_is_a_usage_error(tiny_llama_program: Program) -> None:
    with pytest.raises(UsageError) as caught:
        PruneHeads(fraction=0.25, compensation="least-squares").run(tiny_llama_program, context())
    assert caught.value.code == "CS1121"


def test_sizes_are_computed_for_every_group(tiny_gpt2_program: Program) -> None:
    analysis = analyse(tiny_gpt2_program)
    groups, skips = eligible_groups(analysis, "channels")
    found, unaligned, notes = prunable_groups(analysis, groups, 0.25, context())
    assert [p.kept for p in found] == [64, 64]
    # c_fc 64 x 88 with its bias, c_proj 88 x 64: per channel 64 + 1 + 64
    assert all(p.parameters == pytest.approx(129) for p in found)
    assert not skips
    assert not unaligned
    assert notes
