"""Deliberately wrong rules must be caught: by the fake-tensor proof where shapes disagree, by the oracles where they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from compile_sparse.compiler.axes import algebra, literals
from compile_sparse.compiler.axes import rewrite as engine
from compile_sparse.compiler.axes.algebra import Axis, factors
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.axes.rules import shape
from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.oracles import compare
from tests.toys import toy_program
from tests.unit.axes.test_models import random_keep


def test_wrong_order_of_heads_and_copies_passes_shapes_and_fails_the_oracle(
    tiny_llama_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reversed_product(parts: Iterable[Axis]) -> Axis:
        found = [factor for part in parts for factor in factors(part)]
        if [factor.size for factor in found] == [4, 2]:
            found.reverse()
        return algebra.product(found)

    monkeypatch.setattr(shape, "product", reversed_product)
    analysis = analyse(tiny_llama_program)
    keep = {
        g.anchor: torch.tensor([True, False, True, True])
        for g in analysis.prunable("heads")
        if g.size == 4 and "broadcast" not in g.roles
    }
    assert keep
    pruned = rewrite(tiny_llama_program, analysis, keep)  # every shape fits
    report = compare(pruned, analysis, keep, example_inputs(tiny_llama_program, 2, 5))
    assert not report.holds
    assert report.zero is not None and report.zero > 1e-2


class SelfAttention(torch.nn.Module):
    """Two heads of eight, default attention scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.reshape(2, 5, 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q * 3, k, v)
        out = self.out(y.transpose(1, 2).reshape(2, 5, 16))
        assert isinstance(out, Tensor)
        return out


def _attention_error() -> bool:
    program = toy_program(SelfAttention(), [torch.randn(2, 5, 16)])
    analysis = analyse(program)
    # The value dimension has no default scale: only query and key show the mistake.
    keep = {
        g.anchor: torch.tensor([True, False, True, False, True, True, False, True])
        for g in analysis.prunable("head_dim")
        if "qk_dim" in g.roles
    }
    assert keep
    pruned = rewrite(program, analysis, keep)
    return compare(pruned, analysis, keep, {"x0": torch.randn(2, 5, 16)}).holds


def test_missing_attention_scale_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _attention_error()
    monkeypatch.delitem(literals._WRITERS, "scaled_dot_product_attention")
    assert not _attention_error()


def test_unpruned_rotary_table_fails_the_proof(tiny_llama_program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine._sliced_sources

    def forgetful(*arguments):  # type: ignore[no-untyped-def]
        return {name: source for name, source in honest(*arguments).items() if not name.endswith("inv_freq")}

    monkeypatch.setattr(engine, "_sliced_sources", forgetful)
    analysis = analyse(tiny_llama_program)
    with pytest.raises(CompileSparseError) as caught:
        rewrite(tiny_llama_program, analysis, random_keep(analysis, "head_dim", seed=0))
    assert caught.value.code == "CS2190"
    assert "inv_freq" in caught.value.where


class TwoHalves(torch.nn.Module):
    """Each half of a fused projection goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.a, self.b = torch.nn.Linear(8, 32), torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.fused(x).chunk(2, -1)
        out = self.a(torch.relu(left)) + self.b(torch.tanh(right))
        assert isinstance(out, Tensor)
        return out


def _halves_hold() -> bool:
    program = toy_program(TwoHalves(), [torch.randn(4, 8)])
    analysis = analyse(program)
    keep = {}
    for seed, group in enumerate(analysis.prunable("channels")):
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))[:4]] = False
        keep[group.anchor] = mask
    assert len(keep) == 2
    pruned = rewrite(program, analysis, keep)
    return compare(pruned, analysis, keep, {"x0": torch.randn(4, 8)}).holds


def test_wrong_concatenation_segment_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _halves_hold()

    def swapped(axis: Axis, start: int, stop: int) -> Axis:
        return algebra.segment(axis, (start + 16) % 32, (start + 16) % 32 + stop - start)

    monkeypatch.setattr(shape, "segment", swapped)
    assert not _halves_hold()


def test_rotary_table_with_other_pairs_passes_shapes_and_fails_the_oracle(
    tiny_llama_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = engine._sliced_sources

    def shifted(*arguments):  # type: ignore[no-untyped-def]
        sources = honest(*arguments)
        (name,) = [name for name in sources if name.endswith("inv_freq")]
        sources[name] = ResidentTensor(tiny_llama_program.weights.load(name)[: sources[name].shape[0]])
        return sources

    analysis = analyse(tiny_llama_program)
    pairs = next(g for g in analysis.prunable("head_dim") if "qk_dim" in g.roles)
    keep = {pairs.anchor: torch.tensor([False, True, True, True])}
    inputs = example_inputs(tiny_llama_program, 2, 5)
    assert compare(rewrite(tiny_llama_program, analysis, keep), analysis, keep, inputs).holds
    monkeypatch.setattr(engine, "_sliced_sources", shifted)
    assert not compare(rewrite(tiny_llama_program, analysis, keep), analysis, keep, inputs).holds


def test_attention_scale_of_the_pruned_head_fails_the_oracle(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    keep = random_keep(analysis, "head_dim", seed=0)
    pruned = rewrite(tiny_llama_program, analysis, keep)
    inputs = example_inputs(tiny_llama_program, 2, 5)
    assert compare(pruned, analysis, keep, inputs).holds
    for node in pruned.graph.nodes:
        if op_name(node) == "scaled_dot_product_attention":
            node.kwargs = {**node.kwargs, "scale": None}
    assert not compare(pruned, analysis, keep, inputs).holds


def test_swapped_keys_and_values_of_a_fused_projection_fail_the_oracle(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi3's rows are 48 of queries, 24 of keys, 24 of values."""
    program = captured("phi3")
    other = {(48, 72): (72, 96), (72, 96): (48, 72)}

    def swapped(axis: Axis, start: int, stop: int) -> Axis:
        return algebra.segment(axis, *(other.get((start, stop), (start, stop)) if axis.size == 96 else (start, stop)))

    def holds() -> bool:
        analysis = analyse(program)
        keep = random_keep(analysis, "head_dim", seed=0)
        assert keep
        return compare(rewrite(program, analysis, keep), analysis, keep, example_inputs(program, 2, 5)).holds

    assert holds()
    monkeypatch.setattr(shape, "segment", swapped)
    assert not holds()
