"""Greedy selection with the optimal brain surgeon: remove what the other inputs can replace best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Consumer", "Removal", "removal_order"]

DAMPING = 1e-2
"""Added to the diagonal of the second moment, as a share of its mean."""
LARGEST_STEPS = 512
"""Units are removed one by one up to this many steps; wider groups lose several per step."""


@dataclass(frozen=True)
class Consumer:
    """One linear layer that contracts the axis.

    Attributes:
        weight: ``W: [N, K]``.
        second_moment: ``C = sum x x^T: [K, K]`` of its input, float64.
        units: ``[K]`` int64: unit each input belongs to, -1 for inputs that stay.
        importance: weight of this layer's squared output error against other layers'.
    """

    weight: torch.Tensor
    second_moment: torch.Tensor
    units: torch.Tensor
    importance: float = 1.0


@dataclass(frozen=True)
class Removal:
    """In which order units go, and what each costs.

    Attributes:
        order: unit numbers, first to go first.
        cost: squared output error each removal adds after the kept inputs were refitted, in the same order.
    """

    order: torch.Tensor
    cost: torch.Tensor


def removal_order(consumers: list[Consumer], size: int, remove: int, *, quota: torch.Tensor | None = None) -> Removal:
    """Choose ``remove`` of ``size`` units greedily.

    For unit ``u`` with inputs ``B`` and ``G = (C + damp I)^-1`` over the inputs still there, removing ``B`` and refitting the
    rest raises the squared output error by ``tr(W_B G_BB^-1 W_B^T)``; afterwards ``W <- W - W_B G_BB^-1 G_B`` and
    ``G <- G - G_B^T G_BB^-1 G_B``. Several consumers add their errors.
    Source: optimal brain surgeon in closed form per layer, arXiv:2208.11580; for structures, ZipLM (arXiv:2302.04089).

    Args:
        consumers: layers that read the axis.
        size: number of units.
        remove: how many go.
        quota: ``[size]`` int64: outer position of each unit; every outer position then loses equally many. ``remove`` must be
            a multiple of their number.
    """
    layers = [_Layer(consumer, size) for consumer in consumers]
    gone = torch.zeros(size, dtype=torch.bool)
    allowance = None
    if quota is not None:
        outers = int(quota.max()) + 1
        allowance = torch.full((outers,), remove // outers)
    order: list[int] = []
    cost: list[float] = []
    at_once = max(1, -(-remove // LARGEST_STEPS)) if quota is None else 1
    while len(order) < remove:
        total = torch.stack([layer.costs(gone) for layer in layers]).sum(0)
        blocked = gone if allowance is None or quota is None else gone | (allowance[quota] == 0)
        total[blocked] = torch.inf
        chosen = total.argsort(stable=True)[: min(at_once, remove - len(order))]
        order += chosen.tolist()
        cost += total[chosen].tolist()
        gone[chosen] = True
        if allowance is not None and quota is not None:
            allowance[quota[chosen]] -= 1
        for layer in layers:
            layer.remove(chosen)
    return Removal(torch.tensor(order), torch.tensor(cost, dtype=torch.float64))


class _Layer:
    """One consumer's weight and inverse second moment, updated as inputs go."""

    def __init__(self, consumer: Consumer, size: int) -> None:
        second = consumer.second_moment
        damp = DAMPING * (float(second.diagonal().mean()) or 1.0)
        self.weight = consumer.weight.double().clone()
        self.inverse = torch.cholesky_inverse(
            torch.linalg.cholesky(second + damp * torch.eye(len(second), dtype=second.dtype))
        )
        self.units, self.importance = consumer.units, consumer.importance
        self.single = bool((torch.bincount(self.units[self.units >= 0], minlength=size) == 1).all())
        self.inputs = [] if self.single else [(self.units == unit).nonzero().flatten() for unit in range(size)]
        if self.single:
            self.place = torch.empty(size, dtype=torch.long)
            present = self.units >= 0
            self.place[self.units[present]] = present.nonzero().flatten()

    def costs(self, gone: torch.Tensor) -> torch.Tensor:
        """Error each unit's removal would add; meaningless where it is already gone."""
        if self.single:
            energy = self.weight.square().sum(0)[self.place]
            return self.importance * energy / self.inverse.diagonal()[self.place].clamp_min(1e-300)
        found = torch.zeros(len(gone), dtype=torch.float64)
        for unit in (~gone).nonzero().flatten().tolist():  # units here are heads: tens, not thousands
            block = self.inputs[unit]
            if len(block):
                solved = torch.linalg.solve(self.inverse[block][:, block], self.weight[:, block].t())
                found[unit] = (self.weight[:, block].t() * solved).sum()
        return self.importance * found

    def remove(self, chosen: torch.Tensor) -> None:
        """Take the units' inputs away and let the others replace them."""
        block = self.place[chosen] if self.single else torch.cat([self.inputs[unit] for unit in chosen.tolist()])
        if not len(block):
            return
        rows = self.inverse[block]
        solved = torch.linalg.solve(rows[:, block], rows)
        self.weight -= self.weight[:, block] @ solved
        self.inverse -= rows.t() @ solved
        self.weight[:, block] = 0.0
        self.inverse[block] = 0.0
        self.inverse[:, block] = 0.0
        self.inverse[block, block] = 1.0
