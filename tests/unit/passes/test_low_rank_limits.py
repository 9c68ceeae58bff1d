"""Low rank within its limits: text it needs, amounts out of reach, plans, and what comes after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.storage import stored_bytes
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, WeightStore
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.passes.factoring.candidates import find_candidates
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.quantize import Quantize
from tests.unit.passes.low_rank_cases import (
    assert_same,
    gemms,
    low_rank_context,
)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"criterion": "loss"}, "low-rank.criterion"),
        ({"criterion": "whitened"}, "low-rank.criterion"),
        ({"allocation": "global"}, "low-rank.criterion"),
        ({"compensation": "least-squares"}, "low-rank.compensation"),
    ],
)
def test_what_needs_text_says_so(tiny_llama_program, options, where):
    with pytest.raises(UsageError, match="CS1121") as caught:
        LowRank(fraction=0.3, **options).run(tiny_llama_program, low_rank_context())
    assert caught.value.where == where


@pytest.mark.parametrize("criterion", ["svd", "whitened"])
def test_errors_that_cannot_be_compared_are_not_ranked(criterion):
    with pytest.raises(ValidationError, match="same unit"):
        LowRank(fraction=0.3, criterion=criterion, allocation="global")


def test_an_amount_out_of_reach_is_refused(tiny_llama_program):
    """Rank 16 of 64 x 64 leaves half of it."""
    with pytest.raises(Refusal, match="CS4104") as caught:
        LowRank(fraction=0.9).run(tiny_llama_program, low_rank_context(text=True, alignment=16))
    candidates = find_candidates(tiny_llama_program, low_rank_context(alignment=16))[0]
    least = sum(each.choices.parameters(16) for each in candidates)
    assert f"leave {least:,} of" in caught.value.why


def test_equal_shares_go_as_far_as_the_alignment_allows_and_say_so(tiny_llama_program):
    result = LowRank(fraction=0.9).run(tiny_llama_program, low_rank_context(alignment=16))
    assert set(result.achieved["ranks"].values()) == {16}
    assert result.achieved["fraction"] < 0.6
    assert "90.0% was asked for" in result.notes[0]


def test_equal_shares_leave_a_layer_dense_rather_than_take_far_more(tiny_llama_program):
    """With 1,500 weights for one more GEMM, the highest rank of 64 x 64 that pays holds 62 % of it, asked were 80 %."""
    context = low_rank_context(products=gemms(extra_product_weights=1500))
    result = LowRank(fraction=0.2).run(tiny_llama_program, context)
    assert "model.layers.0.self_attn.q_proj.weight" not in result.achieved["ranks"]
    assert "model.layers.0.self_attn.q_proj.weight" in result.program.weights
    skip = {skip.where: skip for skip in result.diagnostics}["model.layers.0.self_attn.q_proj.weight"]
    assert skip.code == "CS2502" and "62%" in skip.why
    assert "model.layers.0.mlp.up_proj.weight" in result.achieved["ranks"]
    with pytest.raises(Refusal, match="CS4104"):
        LowRank(fraction=0.05).run(tiny_llama_program, context)


# -- together with other passes


def test_the_plan_has_the_sizes_without_weights(tiny_llama_program):
    bare = WeightStore({n: AbsentTensor(s.shape, s.dtype, n) for n, s in tiny_llama_program.weights.items()})
    absent = replace(tiny_llama_program, weights=bare)
    real = LowRank(fraction=0.3).run(tiny_llama_program, low_rank_context())
    for program in (absent, tiny_llama_program):
        planned = LowRank(fraction=0.3).run(program, low_rank_context(plan_only=True))
        verify_program(planned.program)
        assert planned.achieved["ranks"] == real.achieved["ranks"]
        assert stored_bytes(planned.program) == stored_bytes(real.program)
        assert not planned.notes


def test_the_plan_of_a_global_allocation_has_the_total(tiny_llama_program):
    """Also where equal shares would not pay."""
    options = {"text": True, "alignment": 2, "products": gemms(decode_pays_below=0.7)}
    real = LowRank(fraction=0.2, compensation="none").run(tiny_llama_program, low_rank_context(**options))
    planned = LowRank(fraction=0.2).run(tiny_llama_program, low_rank_context(plan_only=True, **options))
    verify_program(planned.program)
    assert planned.achieved["fraction"] == pytest.approx(real.achieved["fraction"], abs=0.01)
    assert planned.notes


def test_followed_by_quantization(tiny_llama_program):
    context = low_rank_context()
    quantized, sections = run_passes(
        tiny_llama_program, [LowRank(fraction=0.3), Quantize(scheme="w8a16")], context, verify_each=True
    )
    factored = LowRank(fraction=0.3).run(tiny_llama_program, context).program
    assert sections[1].achieved["linears"] == len(find_linears(factored)[0])
    # 8 bits with groups of 128: 2^-8 of the largest weight per element, two layers.
    assert_same(quantized, factored, 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rank_is_an_axis_like_any_other(captured, name):
    """The analysis of the result finds the rank, and removing its last positions gives the lower rank."""
    program = captured(name)
    factored = LowRank(fraction=0.3).run(program, low_rank_context()).program
    analysis = analyse(factored)
    axis = 0 if name == "llama" else 1  # of the rank in the inner factor
    inner = [tensor for tensor in factored.weights if ".inner." in tensor]
    ranks = [g for g in analysis.groups if set(g.members) & {(tensor, axis) for tensor in inner}]
    assert len(ranks) == len(inner)
    for group in ranks:
        assert not group.frozen
        assert len(group.members) == 2  # the two factors and nothing else
    keep = {}
    for group in ranks:
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[: group.size // 2] = True
        keep[group.anchor] = mask
    cut = rewrite(factored, analysis, keep)
    verify_program(cut)

    changes = {}
    for tensor in inner:
        zeros = factored.weights.load(tensor).clone()
        half = zeros.shape[axis] // 2
        zeros.narrow(axis, half, zeros.shape[axis] - half).zero_()
        changes[tensor] = ResidentTensor(zeros)
    oracle = replace(factored, weights=factored.weights.updated(changes))
    assert_same(cut, oracle, 2e-6)
