"""Whole models: every kind of group is found, and the pruned program equals the oracles at two sizes of input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.groups import Anchor
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.models import MODELS, example_inputs
from compile_sparse.testing.oracles import compare
from tests.support.encoder_groups import GROUPS as ENCODER_GROUPS

KINDS = ("channels", "heads", "head_dim", "width", "experts", "conv")
_GROUPED = {("heads", 4): 2, ("channels", 88): 2, ("width", 64): 1}
_DISTINCT = {("heads", 3): 2, ("heads", 2): 2, ("channels", 88): 2, ("width", 48): 1}
_EXPERTS = {("heads", 3): 2, ("heads", 2): 2, ("channels", 40): 2, ("width", 48): 1}
_PARTIAL = {("heads", 5): 2, ("channels", 88): 2, ("width", 60): 1}
EXPECTED = {
    "llama": {**_GROUPED, ("heads", 2): 2, ("head_dim", 4): 1, ("head_dim", 8): 2},
    "llama_tied": {**_GROUPED, ("heads", 2): 2, ("head_dim", 4): 1, ("head_dim", 8): 2},
    "qwen2": {**_GROUPED, ("heads", 2): 2, ("head_dim", 4): 1, ("head_dim", 8): 2},
    "qwen3": {**_GROUPED, ("heads", 2): 2, ("head_dim", 8): 1, ("head_dim", 16): 2},
    "gpt2": {("heads", 8): 2, ("channels", 88): 2, ("width", 64): 1, ("head_dim", 8): 4},
    "opt": {("heads", 8): 2, ("channels", 88): 2, ("width", 64): 1, ("head_dim", 8): 4},
    # Rotary pairs are one group for all layers: they share the table of frequencies.
    "phi3": {**_DISTINCT, ("head_dim", 4): 1, ("head_dim", 8): 2},
    "gemma2": {**_DISTINCT, ("head_dim", 5): 1, ("head_dim", 10): 2},
    "gemma3": {**_DISTINCT, ("head_dim", 5): 2, ("head_dim", 10): 2},  # one table per kind of layer
    "mistral": {**_DISTINCT, ("head_dim", 5): 1, ("head_dim", 10): 2},
    # Of 12 dimensions per head 6 are rotated (3 pairs) and 6 are not.
    "gpt_neox": {**_PARTIAL, ("head_dim", 3): 1, ("head_dim", 6): 2, ("head_dim", 12): 2},
    "phi": {**_PARTIAL, ("head_dim", 3): 1, ("head_dim", 6): 2, ("head_dim", 12): 2},
    # Every layer has a table of its own.
    "gptj": {**_PARTIAL, ("head_dim", 3): 2, ("head_dim", 6): 2, ("head_dim", 12): 2},
    "mixtral": {**_DISTINCT, ("head_dim", 5): 1, ("head_dim", 10): 2, ("experts", 7): 2},
    "qwen3_moe": {**_EXPERTS, ("head_dim", 5): 1, ("head_dim", 10): 2, ("experts", 7): 2},
    **ENCODER_GROUPS,
}


def random_keep(analysis: Analysis, kind: str, seed: int) -> dict[Anchor, torch.Tensor]:
    """A quarter of every free group of one kind removed, another choice per group."""
    out = {}
    for place, group in enumerate(analysis.prunable(kind)):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        kept = torch.ones(group.size, dtype=torch.bool)
        kept[torch.randperm(group.size, generator=generator)[: max(1, group.size // 4)]] = False
        out[group.anchor] = kept
    return out


@pytest.fixture(params=list(MODELS))
def program(request: pytest.FixtureRequest, captured: Callable[[str], Program]) -> Program:
    return captured(request.param)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    found = request.node.callspec.params["program"]
    assert isinstance(found, str)
    return found


def test_every_group_is_found_and_no_operator_is_unknown(program: Program, name: str) -> None:
    analysis = analyse(program)
    assert dict(Counter((g.kind, g.size) for g in analysis.prunable())) == EXPECTED[name]
    assert not analysis.unknown
    assert not analysis.conflicts


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_equals_oracles(program: Program, name: str, kind: str) -> None:
    analysis = analyse(program)
    keep = random_keep(analysis, kind, seed=1)
    if not keep:
        assert not any(found == kind for found, _ in EXPECTED[name])
        return
    pruned = rewrite(program, analysis, keep)
    assert pruned.parameter_count() < program.parameter_count()
    for batch, length in ((2, 7), (3, 4)):
        report = compare(pruned, analysis, keep, example_inputs(program, batch, length))
        assert report.holds, report


def test_everything_at_once(program: Program) -> None:
    analysis = analyse(program)
    keep = {}
    for kind in KINDS:
        keep.update(random_keep(analysis, kind, seed=2))
    pruned = rewrite(program, analysis, keep)
    report = compare(pruned, analysis, keep, example_inputs(program, 2, 6))
    assert report.holds, report


def test_pruning_the_pruned_again(tiny_llama_program: Program) -> None:
    first = analyse(tiny_llama_program)
    once = rewrite(tiny_llama_program, first, random_keep(first, "heads", seed=3))
    second = analyse(once)
    keep = random_keep(second, "channels", seed=4)
    twice = rewrite(once, second, keep)
    report = compare(twice, second, keep, example_inputs(once, 2, 5))
    assert report.holds, report


def test_another_query_head_per_key_head(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    copies = next(g for g in analysis.prunable("heads") if "broadcast" in g.roles)
    outer = next(g for g in analysis.prunable("heads") if "broadcast" not in g.roles and g.members[0] in copies.members)
    table = torch.tensor([[True, False], [False, True], [False, True], [True, False]])
    keep = {copies.anchor: (outer.anchor, table)}
    pruned = rewrite(tiny_llama_program, analysis, keep)
    report = compare(pruned, analysis, keep, example_inputs(tiny_llama_program, 2, 5))
    assert report.zero is not None and report.holds, report


def test_cache_inputs_shrink_with_the_heads(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    pruned = rewrite(tiny_llama_program, analysis, random_keep(analysis, "heads", seed=5))
    for entry in pruned.inputs:
        if entry.role in ("past_key", "past_value"):
            assert pruned.node(entry.placeholder).meta["val"].shape[1] == 3  # of 4


def test_analysis_names_are_stable(tiny_llama_program: Program) -> None:
    first, second = analyse(tiny_llama_program), analyse(tiny_llama_program.clone())
    assert [str(g.anchor) for g in first.groups] == [str(g.anchor) for g in second.groups]
    assert len({g.anchor for g in first.groups}) == len(first.groups)
