"""Sizes that a graph computes when it runs follow the pruned axis that is a factor of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from compile_sparse.compiler.axes import literals
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.oracles import OracleReport, compare
from tests.toys import toy_program
from tests.unit.axes.test_models import random_keep


class FoldedHeads(torch.nn.Module):
    """Four heads folded into the batch, ``[batch * 4, 5, 3]``, and a table per head that is repeated for every row.

    ``lengths`` is stretched to the folded batch, by a product of the batch and the number of heads.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.table = torch.nn.Linear(7, 12), torch.nn.Parameter(torch.randn(4, 5, 3))
        self.out = torch.nn.Linear(12, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        query = self.query(x).view(x.shape[0], 5, 4, 3).permute(0, 2, 1, 3).reshape(-1, 5, 3)
        scores = torch.bmm(query, self.table.repeat(query.shape[0] // 4, 1, 1).transpose(1, 2))
        weights = torch.gather(scores, 1, lengths[:1, :, None].expand(4 * x.shape[0], 5, 5)).softmax(-1)
        mixed = torch.bmm(weights, query).view(x.shape[0], 4, 5, 3).permute(0, 2, 1, 3)
        out = self.out(mixed.reshape(x.shape[0], 5, 12))
        assert isinstance(out, Tensor)
        return out


def _program() -> Program:
    batch = Dim("batch", min=2, max=9)
    arguments = [torch.zeros(3, 5, 7), torch.zeros(3, 5, dtype=torch.long)]
    return toy_program(FoldedHeads(), arguments, [{0: batch}, {0: batch}])


def _report(program: Program, batch: int) -> OracleReport:
    analysis = analyse(program)
    keep = random_keep(analysis, "heads", seed=1)
    assert keep
    assert not any(
        "broadcast" in group.roles for group in analysis.prunable("heads")
    )  # they are heads, not copies of them
    pruned = rewrite(program, analysis, keep)
    generator = torch.Generator().manual_seed(batch)
    inputs = {
        "x0": torch.randn(batch, 5, 7, generator=generator),
        "x1": torch.randint(0, 5, (batch, 5), generator=generator),
    }
    return compare(pruned, analysis, keep, inputs)


@pytest.mark.parametrize("batch", [2, 4])
def test_a_multiple_of_the_batch_follows(batch: int) -> None:
    report = _report(_program(), batch)
    assert report.holds, report


def test_a_multiple_that_does_not_follow_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(literals, "_rescaled", lambda site, size, axis: size)
    with pytest.raises(CompileSparseError) as caught:
        _report(_program(), 2)
    assert caught.value.code == "CS2190"
