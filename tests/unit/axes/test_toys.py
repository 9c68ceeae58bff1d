"""Blocks ``Linear -> relu -> f -> Linear``: position-dependent f freezes the channels, the others are pruned and equal M."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import ModelError
from compile_sparse.testing.oracles import compare
from tests.toys import toy_program

FROZEN: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "sort": lambda x: x.sort(-1)[0],
    "roll": lambda x: x.roll(1, -1),
    "fft": lambda x: torch.fft.rfft(x).real.repeat(1, 2)[:, :16],
    "pad": lambda x: torch.nn.functional.pad(x, (1, 0))[:, :16],
    "unfold": lambda x: x.unfold(1, 4, 4).reshape(x.shape[0], 16),
    "position bias": lambda x: x + torch.arange(16) * 0.1,
    "constant index": lambda x: x[:, torch.arange(15, -1, -1)],
    "tril": lambda x: (x[:, :, None] * x[:, None, :]).tril().sum(1),
    "position as number": lambda x: x * x.argmax(-1, keepdim=True),
    "random": lambda x: x * torch.rand_like(x),
}
PRUNED: dict[str, Callable[[Tensor], Tensor]] = {
    "stack": lambda x: torch.stack([x, x * 2], -1).sum(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: (x + 1).cumprod(-1),
    "top-k values": lambda x: x + x.topk(3, -1)[0].sum(-1, keepdim=True),
    "top-k gather": lambda x: x + torch.gather(x, -1, x.topk(2, -1)[1]).sum(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (16,)),
    "odd then even": lambda x: torch.cat([x[:, 1::2], x[:, 0::2]], -1),
    "einsum": lambda x: torch.einsum("bi,bi->bi", x, x),
    "outer product": lambda x: (x[:, :, None] * x[:, None, :]).sum(1),
    "flattened outer product": lambda x: (x[:, :, None] * x[:, None, :]).flatten(1).reshape(-1, 16, 16).sum(2),
    "shuffle": lambda x: x.view(-1, 4, 4).transpose(1, 2).reshape(x.shape[0], 16),
    "swapped halves": lambda x: torch.cat([x.chunk(2, -1)[1], x.chunk(2, -1)[0] * 2], -1),
}


class Block(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.function = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), function

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(self.function(torch.relu(self.up(x))))
        assert isinstance(out, Tensor)
        return out


def _program(function: Callable[[Tensor], Tensor]):  # type: ignore[no-untyped-def]
    return toy_program(Block(function), [torch.zeros(3, 8)], [{0: Dim("batch", min=2, max=9), 1: None}])


@pytest.mark.parametrize("name", FROZEN)
def test_position_dependent_blocks_are_frozen_with_a_reason(name: str) -> None:
    program = _program(FROZEN[name])
    analysis = analyse(program)
    group = next(g for g in analysis.groups if ("up.weight", 0) in g.members)
    assert not analysis.prunable()
    assert "op '" in group.frozen[0].reason or "addressed by data" in group.frozen[0].reason
    assert "test_toys.py" in group.frozen[0].source
    with pytest.raises(ModelError) as caught:
        rewrite(program, analysis, {group.anchor: torch.arange(group.size) < 1})
    assert caught.value.code == "CS2104"
    assert group.frozen[0].reason in caught.value.why


@pytest.mark.parametrize("name", PRUNED)
def test_other_blocks_are_pruned_and_equal_the_masked_oracle(name: str) -> None:
    program = _program(PRUNED[name])
    analysis = analyse(program)
    keep = {}
    for seed, group in enumerate(analysis.prunable()):
        mask = torch.rand(group.size, generator=torch.Generator().manual_seed(seed)) > 0.4
        mask[:3] = True
        mask[-1] = False
        keep[group.anchor] = mask
    assert keep
    pruned = rewrite(program, analysis, keep)
    assert pruned.parameter_count() < program.parameter_count()
    for batch in (2, 5):
        report = compare(pruned, analysis, keep, {"x0": torch.randn(batch, 8)})
        assert report.masked is not None and report.holds, report
