"""Greedy selection with the optimal brain surgeon: remove what the other inputs can replace best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compile_sparse.compiler.errors import ModelError

__all__ = ["Consumer", "Removal", "removal_order"]

DAMPING = 1e-2
"""Added to the diagonal of the second moment, as a share of each element: a few large inputs must not hide the others."""
FLOOR = 1e-9
"""Added as well, as a share of the mean: inputs that the text never drives."""
DELAYED = 64
"""Inputs that go before the tables are brought up to date."""
TINY = 1e-300


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


def removal_order(
    consumers: list[Consumer],
    size: int,
    remove: int,
    *,
    quota: torch.Tensor | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Removal:
    """Choose ``remove`` of ``size`` units greedily, one by one.

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
        advance: told of every unit that was chosen.

    Raises:
        ModelError: CS2503 when activations or weights are not finite.
    """
    layers = [_Layer(consumer, size) for consumer in consumers]
    gone = torch.zeros(size, dtype=torch.bool)
    taken = torch.zeros(0 if quota is None else int(quota.max()) + 1, dtype=torch.bool)  # in this round
    order: list[int] = []
    cost: list[float] = []
    while len(order) < remove:
        total = torch.stack([layer.costs(gone) for layer in layers]).sum(0)
        total[gone if quota is None else gone | taken[quota]] = torch.inf
        chosen = int(total.argmin())
        order.append(chosen)
        cost.append(float(total[chosen]))
        gone[chosen] = True
        if quota is not None:
            taken[quota[chosen]] = True
            if bool(taken.all()):
                taken[:] = False
        for layer in layers:
            layer.remove(chosen)
        advance(1)
    return Removal(torch.tensor(order), torch.tensor(cost, dtype=torch.float64))


class _Layer:
    """One consumer's energy ``E`` and inverse second moment ``G``, updated as inputs go.

    With ``u = G_p / sqrt(G_pp)`` and ``a = (E_p - E_pp G_p / (2 G_pp)) / sqrt(G_pp)``, rows ``p`` of the tables as they then are,
    removing input ``p`` is ``G <- G - u u^T``, ``E <- E - a u^T - u a^T``. Each step needs one row and the diagonals only, so
    updates wait, as in LAPACK's pivoted Cholesky factorisation: a row is brought up to date when it is read, and the tables by
    one GEMM when ``DELAYED`` updates are due.
    """

    def __init__(self, consumer: Consumer, size: int) -> None:
        self.energy, self.inverse = consumer.energy.clone(), _inverse(consumer.second_moment)
        inputs, double = len(self.inverse), torch.float64
        self.left, self.lost = torch.empty(DELAYED, inputs, dtype=double), torch.empty(DELAYED, inputs, dtype=double)
        self.waiting = 0
        self.energies, self.variances = self.energy.diagonal().clone(), self.inverse.diagonal().clone()
        present = consumer.units >= 0
        counts = torch.bincount(consumer.units[present], minlength=size)
        self.inputs = present.nonzero().flatten()[consumer.units[present].argsort(stable=True)].split(counts.tolist())
        self.single = torch.cat(self.inputs) if bool((counts == 1).all()) else None

    def costs(self, gone: torch.Tensor) -> torch.Tensor:
        """Error each unit's removal would add; meaningless where it is already gone."""
        if self.single is not None:
            return self.energies[self.single] / self.variances[self.single].clamp_min(TINY)
        self._update()
        found = torch.zeros(len(gone), dtype=torch.float64)
        for unit in (~gone).nonzero().flatten().tolist():  # units of several inputs are heads: tens, not thousands
            block = self.inputs[unit]
            if len(block):
                found[unit] = torch.linalg.solve(self.inverse[block][:, block], self.energy[block][:, block]).trace()
        return found

    def remove(self, unit: int) -> None:
        """Take a unit's inputs away and let the others replace them. One after the other is the same as all at once."""
        for place in self.inputs[unit].tolist():
            if self.waiting == DELAYED:
                self._update()
            self._remove(place)

    def _remove(self, place: int) -> None:
        lost, left = self.lost[: self.waiting], self.left[: self.waiting]
        row = self.inverse[place] - left[:, place] @ left
        energy = self.energy[place] - lost[:, place] @ left - left[:, place] @ lost
        root = row[place].clamp_min(TINY).sqrt()
        new = row / root
        moved = (energy - (0.5 * energy[place] / root) * new) / root
        self.left[self.waiting], self.lost[self.waiting] = new, moved
        self.waiting += 1
        self.variances -= new.square()
        self.energies -= 2.0 * moved * new

    def _update(self) -> None:
        lost, left = self.lost[: self.waiting], self.left[: self.waiting]
        self.inverse.addmm_(left.t(), left, alpha=-1.0)
        self.energy.addmm_(lost.t(), left, alpha=-1.0).addmm_(left.t(), lost, alpha=-1.0)
        self.waiting = 0


def _inverse(second: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(second).all()):
        raise ModelError(
            "CS2503",
            "Positions cannot be ranked.",
            why="Activations on the calibration text are not finite.",
            hint="Check the model's weights, or set criterion: magnitude.",
        )
    diagonal = second.diagonal()
    floor = FLOOR * (float(diagonal.mean()) or 1.0)
    damping, failed = DAMPING, torch.tensor(1)
    while int(failed):
        factor, failed = torch.linalg.cholesky_ex(second + torch.diag(damping * diagonal + damping / DAMPING * floor))
        damping *= 10.0
    return torch.cholesky_inverse(factor)
