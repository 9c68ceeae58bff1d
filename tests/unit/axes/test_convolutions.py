"""Convolutional networks: which channels hang together, which weights sum over them, and wrong couplings that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from compile_sparse.compiler.axes import algebra, literals
from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.axes.rules import convolution, spatial
from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.oracles import OracleReport, compare
from tests.toys import ConvNet, toy_program
from tests.unit.axes.test_models import random_keep

BATCH = {0: Dim("batch", min=2, max=9)}


@pytest.fixture(scope="module")
def network() -> Program:
    return toy_program(ConvNet(), [torch.zeros(3, 3, 8, 8)], [BATCH])


def _report(program: Program, batch: int, seed: int = 3) -> OracleReport:
    analysis = analyse(program)
    keep = random_keep(analysis, "conv", seed)
    assert keep
    pruned = rewrite(program, analysis, keep)
    assert pruned.parameter_count() < program.parameter_count()
    shape = program.node(program.inputs[0].placeholder).meta["val"].shape[1:]
    inputs = {"x0": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))}
    return compare(pruned, analysis, keep, inputs)


def _group(analysis: Analysis, anchor: str) -> Group:
    return next(group for group in analysis.groups if str(group.anchor) == anchor)


def test_groups_of_a_convolutional_network(network: Program) -> None:
    analysis = analyse(network)
    assert not analysis.unknown
    assert not analysis.conflicts
    # 16 residual channels are 4 groups of 4 to the grouped convolution; its 24 outputs are 4 groups of 6 to itself, 8 of 3 to the
    # group norm and 2 of 12 to the transposed convolution, so 24 = 2 * 2 * 2 * 3 and 16 = 2 * 2 * 4.
    assert {(group.kind, group.size, str(group.anchor)) for group in analysis.prunable()} == {
        ("conv", 2, "stem.weight[0.0.0]"),
        ("conv", 2, "stem.weight[0.0.1]"),
        ("conv", 4, "stem.weight[0.1]"),
        ("conv", 10, "inner.weight[0]"),
        ("conv", 2, "grouped.weight[0.1.0]"),
        ("conv", 3, "grouped.weight[0.1.1]"),
        ("conv", 7, "transposed.weight[1]"),
    }
    # Flattened before the linear: a channel is a block of its columns.
    assert ("head.weight", 1) in _group(analysis, "transposed.weight[1]").members


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("seed", [3, 4])
def test_pruned_equals_the_oracles(network: Program, batch: int, seed: int) -> None:
    report = _report(network, batch, seed)
    assert report.holds, report


def test_consumers_are_the_weights_that_sum_over_a_channel(network: Program) -> None:
    """Depthwise convolution sums over no channel; a grouped one over the channels inside a group, not over the groups."""
    analysis = analyse(network)
    consumers = {
        str(g.anchor): {(contact.weight, contact.operand, contact.dim) for contact in g.consumers}
        for g in analysis.prunable()
    }
    nodes = {name: next(n for n in network.graph.nodes if n.name == name) for name in analysis.labels}
    assert consumers["inner.weight[0]"] == {("outer.weight", "relu_1", 1)}
    assert {weight for weight, _, _ in consumers["stem.weight[0.1]"]} == {"inner.weight", "grouped.weight"}
    assert {weight for weight, _, _ in consumers["stem.weight[0.0.0]"]} == {"inner.weight", "head.weight"}
    for group in analysis.prunable():
        for contact in group.consumers:
            axis = analysis.labels[contact.operand][contact.dim]  # type: ignore[index]
            assert isinstance(axis, Axis)
            assert group.leaf in algebra.leaves(axis)
            assert nodes[contact.operand].meta["val"].shape[contact.dim] == algebra.find(axis).size
        assert {contact.weight for contact in group.producers} <= {tensor for tensor, _ in group.members}
    assert {contact.weight for contact in _group(analysis, "inner.weight[0]").producers} == {
        "inner.weight",
        "depthwise.weight",
    }


class Einsum(torch.nn.Module):
    """``relu(x A) B`` written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.randn(6, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...c,oc->...o", torch.einsum("bsi,ci->bsc", x, self.up).relu(), self.down)


def test_einsum_names_its_producer_and_consumer() -> None:
    analysis = analyse(toy_program(Einsum(), [torch.zeros(2, 3, 6)]))
    (group,) = analysis.prunable()
    assert [(contact.weight, contact.operand, contact.dim) for contact in group.consumers] == [("down", "relu", 2)]
    assert [contact.weight for contact in group.producers] == ["up"]
    assert group.kind == "channels"


# -- wrong rules: each must be caught by the oracle, because every shape fits


class Between(torch.nn.Module):
    """``convolution -> function -> convolution``."""

    def __init__(self, function: Callable[[Tensor], Tensor], inner: int, outer: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = torch.nn.Conv2d(3, inner, 3), torch.nn.Conv2d(outer, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.function(self.first(x)))
        assert isinstance(out, Tensor)
        return out


def _between(function: Callable[[Tensor], Tensor], inner: int, outer: int) -> Program:
    return toy_program(Between(function, inner, outer), [torch.zeros(3, 3, 8, 8)], [BATCH])


def _reversed(parts: Iterable[Axis]) -> Axis:
    return algebra.product(reversed(list(parts)))


def test_groups_inside_channels_fail_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _between(torch.nn.ConvTranspose2d(8, 12, 2, groups=4), 8, 12)
    assert _report(program, 2).holds
    monkeypatch.setattr(convolution, "product", _reversed)
    assert not _report(program, 2).holds


def test_channels_that_are_not_shuffled_fail_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _between(lambda x: F.channel_shuffle(x, 3).relu(), 12, 12)
    assert _report(program, 2).holds
    monkeypatch.setattr(spatial, "product", _reversed)
    assert not _report(program, 2).holds


def test_pixels_outside_channels_fail_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _between(lambda x: F.pixel_shuffle(x, 2).relu(), 16, 4)
    assert _report(program, 2).holds

    def swapped(parts: list[Axis], sizes: list[int]) -> list[Axis]:
        return algebra.regroup(parts, sizes[::-1])[::-1]

    monkeypatch.setattr(spatial, "regroup", swapped)
    assert not _report(program, 2).holds


def test_a_depthwise_convolution_that_keeps_its_groups_fails_the_proof(
    network: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(literals._WRITERS, "conv2d")
    with pytest.raises(CompileSparseError) as caught:
        _report(network, 2)
    assert caught.value.code == "CS2190"
    assert "conv2d" in caught.value.where


def test_padding_keeps_the_batch_dynamic() -> None:
    """torch's own rule for fakes would turn the symbol into the sample's batch, and the proof would fail."""
    program = _between(lambda x: F.conv2d(F.pad(x, (1, 2, 0, 1)), torch.ones(12, 3, 2, 2), groups=4).relu(), 12, 12)
    report = _report(program, 4)
    assert report.holds, report
