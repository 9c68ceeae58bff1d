"""Greedy selection with the optimal brain surgeon: remove what the other inputs can replace best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_sparse.compiler.errors import ModelError

__all__ = ["Consumer", "Removal", "removal_order"]

DAMPING = 1e-2
"""Added to the diagonal of the second moment, as a share of its mean."""
LARGEST_STEPS = 512
"""Units are removed one by one up to this many steps; wider groups lose several per step."""


@dataclass(frozen=True)
class Consumer:
    """One value that linear layers contract over the axis. Layers with the same input count together.

    Attributes:
        energy: ``sum over layers of W^T W: [K, K]`` float64, ``W: [N, K]``, each weighted by how much its squared output error
            matters against the others'.
        second_moment: ``C = sum x x^T: [K, K]`` of the input, float64.
        units: ``[K]`` int64: unit each input belongs to, -1 for inputs that stay.
    """

    energy: torch.Tensor
    second_moment: torch.Tensor
    units: torch.Tensor


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
    ``G <- G - G_B^T G_BB^-1 G_B``. Only ``W^T W`` is needed and kept, whatever the number of outputs. Several consumers add
    their errors. With a quota every round takes one unit from each outer position, so any whole number of rounds is balanced.
    Source: optimal brain surgeon in closed form per layer, arXiv:2208.11580; for structures, ZipLM (arXiv:2302.04089).

    Args:
        consumers: layers that read the axis.
        size: number of units.
        remove: how many go.
        quota: ``[size]`` int64: outer position of each unit; every outer position then loses equally many. ``remove`` must be
            a multiple of their number.

    Raises:
        ModelError: CS2503 when activations or weights are not finite.
    """
    layers = [_Layer(consumer, size) for consumer in consumers]
    gone = torch.zeros(size, dtype=torch.bool)
    taken = torch.zeros(0 if quota is None else int(quota.max()) + 1, dtype=torch.bool)  # in this round
    order: list[int] = []
    cost: list[float] = []
    at_once = max(1, -(-remove // LARGEST_STEPS)) if quota is None else 1
    while len(order) < remove:
        total = torch.stack([layer.costs(gone) for layer in layers]).sum(0)
        total[gone if quota is None else gone | taken[quota]] = torch.inf
        chosen = total.argsort(stable=True)[: min(at_once, remove - len(order))]
        order += chosen.tolist()
        cost += total[chosen].tolist()
        gone[chosen] = True
        if quota is not None:
            taken[quota[chosen]] = True
            if bool(taken.all()):
                taken[:] = False
        for layer in layers:
            layer.remove(chosen)
    return Removal(torch.tensor(order), torch.tensor(cost, dtype=torch.float64))


class _Layer:
    """One consumer's energy and inverse second moment, updated as inputs go."""

    def __init__(self, consumer: Consumer, size: int) -> None:
        self.energy, self.inverse = consumer.energy.clone(), _inverse(consumer.second_moment)
        self.units = consumer.units
        present = self.units >= 0
        self.single = bool((torch.bincount(self.units[present], minlength=size) == 1).all())
        self.inputs = [] if self.single else [(self.units == unit).nonzero().flatten() for unit in range(size)]
        if self.single:
            self.place = torch.empty(size, dtype=torch.long)
            self.place[self.units[present]] = present.nonzero().flatten()

    def costs(self, gone: torch.Tensor) -> torch.Tensor:
        """Error each unit's removal would add; meaningless where it is already gone."""
        if self.single:
            return self.energy.diagonal()[self.place] / self.inverse.diagonal()[self.place].clamp_min(1e-300)
        found = torch.zeros(len(gone), dtype=torch.float64)
        for unit in (~gone).nonzero().flatten().tolist():  # units of several inputs are heads: tens, not thousands
            block = self.inputs[unit]
            if len(block):
                found[unit] = torch.linalg.solve(self.inverse[block][:, block], self.energy[block][:, block]).trace()
        return found

    def remove(self, chosen: torch.Tensor) -> None:
        """Take the units' inputs away and let the others replace them."""
        block = self.place[chosen] if self.single else torch.cat([self.inputs[unit] for unit in chosen.tolist()])
        if not len(block):
            return
        rows = self.inverse[block]
        solved = torch.linalg.solve(rows[:, block], rows)  # G_BB^-1 G_B
        moved = self.energy[:, block] @ solved
        self.energy += solved.t() @ self.energy[block][:, block] @ solved - moved - moved.t()
        self.inverse -= rows.t() @ solved
        for table in (self.energy, self.inverse):
            table[block] = 0.0
            table[:, block] = 0.0
        self.inverse[block, block] = 1.0


def _inverse(second: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(second).all()):
        raise ModelError(
            "CS2503",
            "Positions cannot be ranked.",
            why="Activations on the calibration text are not finite.",
            hint="Check the model's weights, or set criterion: magnitude.",
        )
    scale = float(second.diagonal().mean()) or 1.0
    damping, failed = DAMPING, torch.tensor(1)
    while int(failed):
        damped = second + damping * scale * torch.eye(len(second), dtype=second.dtype)
        factor, failed = torch.linalg.cholesky_ex(damped)
        damping *= 10.0
    return torch.cholesky_inverse(factor)
