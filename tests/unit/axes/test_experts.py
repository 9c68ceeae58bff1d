"""Experts as transformers can also compute them: rows sorted by expert, then one product per run of rows."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.export import Dim
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.edit import eliminate_dead_code, op_name
from compile_sparse.testing.oracles import compare
from tests.toys import toy_program

HIDDEN, INNER, EXPERTS = 16, 24, 7  # the native kernel wants multiples of 16 bytes


def analysed(dtype: torch.dtype) -> Analysis:
    torch.manual_seed(0)
    config = hf.MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
    sizes = {0: Dim("batch", min=2, max=9), 1: Dim("length", min=2, max=99)}
    program = eliminate_dead_code(toy_program(block.to(dtype), [torch.randn(2, 5, HIDDEN, dtype=dtype)], [sizes]))
    return analyse(program)


@pytest.mark.parametrize(
    ("operator", "dtype"), [("grouped_mm_fallback", torch.float32), ("_grouped_mm", torch.bfloat16)]
)
def test_grouped_experts_and_their_channels_are_pruned(
    operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if operator == "grouped_mm_fallback":
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *given: False)
    analysis = analysed(dtype)
    program = analysis.program
    assert operator in {op_name(node) for node in program.graph.nodes}
    assert not analysis.unknown
    assert [(g.kind, g.size) for g in analysis.prunable()] == [("experts", EXPERTS), ("channels", INNER)]
    experts, channels = analysis.prunable()
    assert {tensor for tensor, _ in experts.members} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    inner = torch.ones(INNER, dtype=torch.bool)
    inner[[1, 2, 5, 11, 12, 13, 20, 23]] = False
    keep = {experts.anchor: torch.tensor([True, False, True, True, True, False, True]), channels.anchor: inner}
    pruned = rewrite(program, analysis, keep)
    for batch, length in ((2, 7), (3, 4)):
        report = compare(pruned, analysis, keep, {"x0": torch.randn(batch, length, HIDDEN).to(dtype)})
        assert report.zero is None  # zeroed router columns are logits of 0, which may be chosen: Z is no oracle here
        assert report.holds, report


def test_fewer_experts_than_are_chosen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *given: False)
    analysis = analysed(torch.float32)
    (experts,) = analysis.prunable("experts")
    with pytest.raises(ModelError) as caught:
        rewrite(analysis.program, analysis, {experts.anchor: torch.arange(EXPERTS) == 3})
    assert caught.value.code == "CS2107"
    assert "best 2 of 1" in caught.value.why
