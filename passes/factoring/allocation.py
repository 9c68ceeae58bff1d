"""Which rank each layer gets."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Choices", "allocate", "uniform_rank"]


FAR = 0.125
"""How much more than asked for a layer may lose because of alignment and of what pays, as a share of its parameters."""


@dataclass(frozen=True)
class Choices:
    """What may become of one weight ``[rows, columns]``: stay as it is, or be two factors of one of ``ranks``.

    Attributes:
        rows, columns: of the weight.
        ranks: ascending, each with fewer parameters than the weight.
    """

    rows: int
    columns: int
    ranks: Sequence[int]

    @property
    def dense(self) -> int:
        """Parameters of the weight."""
        return self.rows * self.columns

    def parameters(self, rank: int | None) -> int:
        """Parameters left at ``rank``; None: the weight stays."""
        return self.dense if rank is None else rank * (self.rows + self.columns)


def uniform_rank(choices: Choices, fraction: float) -> int | None:
    """The rank nearest to the one that removes ``fraction`` of the parameters; ties keep more.

    None, the weight stays dense, when every rank there is would remove more than ``fraction + FAR`` of them.
    """
    if choices.parameters(choices.ranks[-1]) < (1.0 - fraction - FAR) * choices.dense:
        return None
    wanted = (1.0 - fraction) * choices.dense / (choices.rows + choices.columns)
    return min(choices.ranks, key=lambda rank: (abs(rank - wanted), -rank))


def allocate(
    choices: Mapping[str, Choices], energies: Mapping[str, torch.Tensor], fraction: float
) -> dict[str, int | None] | None:
    """Ranks that miss the least energy in all with at most ``1 - fraction`` of the parameters.

    Every layer starts at its lowest rank. A layer's missed energy against its parameters, the dense weight (nothing missed)
    included, has a lower convex hull; steps along the hulls are taken in order of energy saved per parameter, as long as they
    fit (the optimum of the Lagrangian relaxation), and ranks beside the hull use up what is left.

    Args:
        choices: by layer.
        energies: by layer, descending, in one unit for all layers: rank ``r`` misses the sum of ``energies[r:]``.
        fraction: share of the parameters to remove.

    Returns:
        Rank by layer, None where the weight stays dense; or None when even the lowest ranks leave too many parameters.
    """
    hulls = {name: _hull(each, energies[name]) for name, each in choices.items()}
    ranks: dict[str, int | None] = {name: each.ranks[0] for name, each in choices.items()}
    room = int((1.0 - fraction) * sum(each.dense for each in choices.values()))
    room -= sum(each.parameters(ranks[name]) for name, each in choices.items())
    if room < 0:
        return None
    steps: list[tuple[float, str, int]] = []  # energy per parameter, negated; layer; place on its hull

    def offer(name: str, place: int) -> None:
        if place < len(hulls[name]):
            here, there = hulls[name][place - 1], hulls[name][place]
            saved = (here.missed - there.missed) / (there.parameters - here.parameters)
            heapq.heappush(steps, (-saved, name, place))

    for name in choices:
        offer(name, 1)
    while steps:
        _, name, place = heapq.heappop(steps)
        layer, point = choices[name], hulls[name][place]
        used = layer.parameters(ranks[name])
        if point.parameters - used <= room:
            ranks[name] = point.rank
            offer(name, place + 1)
        else:  # the rest of the room, which no later step of this layer fits either
            ranks[name] = max(rank for rank in layer.ranks if layer.parameters(rank) - used <= room)
        room -= layer.parameters(ranks[name]) - used
    return ranks


@dataclass(frozen=True)
class _Point:
    parameters: int
    missed: float
    rank: int | None


def _hull(choices: Choices, energies: torch.Tensor) -> list[_Point]:
    """Lower convex hull of missed energy over parameters, in ascending order of parameters."""
    missed = [*energies.double().flip(0).cumsum(0).flip(0).tolist(), 0.0]
    points = [_Point(choices.parameters(rank), missed[rank], rank) for rank in choices.ranks]
    hull: list[_Point] = []
    for point in [*points, _Point(choices.dense, 0.0, None)]:
        while len(hull) > 1 and _above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(middle: _Point, left: _Point, right: _Point) -> bool:
    """Whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    rise = (right.missed - left.missed) * (middle.parameters - left.parameters)
    return (middle.missed - left.missed) * (right.parameters - left.parameters) >= rise
