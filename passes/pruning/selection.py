"""In which order positions go, and how many each group loses."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords, find
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.axes.selection import Keep
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.nodes import fake_tensor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.passes.criteria.positions import axis_of
from compile_sparse.passes.criteria.registry import CRITERIA
from compile_sparse.passes.pruning.groups import Prunable
from compile_sparse.passes.pruning.obs import Consumer, Removal, removal_order
from compile_sparse.passes.reconstruction.matching import objective_of
from compile_sparse.passes.statistics.gram import Gram, each_gram
from compile_sparse.passes.statistics.norms import feature_norms

__all__ = ["Choice", "keep_table", "kept_sizes", "outer_of", "rank_by_obs", "rank_by_score", "with_closed_form"]

LARGEST_TABLES_BYTES = 6 << 30
TABLES = 4
"""Float64 tables of input size squared that OBS keeps per distinct input."""
MOST_BLOCKS = 512
"""Most positions that bring several inputs each and are tried one by one."""
LEAST_SHARE = 4
"""A global ranking takes no group below this fraction (one over) of its positions."""


@dataclass(frozen=True)
class Choice:
    """How one group shrinks.

    Attributes:
        prunable: the group and its sizes.
        removal: which positions go first, and their costs.
        outer: with it, the order numbers cells ``outer * size + position``, one from every outer position per round, and the
            costs are those of rounds.
    """

    prunable: Prunable
    removal: Removal
    outer: Group | None = None


def with_closed_form(analysis: Analysis, prunables: Sequence[Prunable]) -> list[Prunable]:
    """Those that ``rank_by_obs`` can rank. The graph is searched for linear layers once."""
    linears = {linear.node.name: linear for linear in find_linears(analysis.program)[0]}
    return [prunable for prunable in prunables if _has_closed_form(analysis, prunable.group, linears)]


def _has_closed_form(analysis: Analysis, group: Group, linears: Mapping[str, Linear]) -> bool:
    """Whether the error left after refitting has a closed form that is cheap enough.

    Every consumer must be a plain linear layer, the tables of all its inputs must fit in ``LARGEST_TABLES_BYTES`` together, and
    positions of several inputs each must be few (heads).
    """
    if not group.consumers or any(contact.node not in linears for contact in group.consumers):
        return False
    readers = [linears[contact.node] for contact in group.consumers]
    widths = {reader.input.name: analysis.program.weights[reader.tensor].shape[reader.axis] for reader in readers}
    if sum(TABLES * 8 * width**2 for width in widths.values()) > LARGEST_TABLES_BYTES:
        return False
    return group.size <= MOST_BLOCKS or all(width <= group.size for width in widths.values())


def rank_by_score(
    analysis: Analysis, prunables: Sequence[Prunable], criterion: str, context: PassContext, *, comparable: bool
) -> list[Choice]:
    """Lowest scores first.

    Args:
        analysis, prunables: what is ranked.
        criterion: a name of ``CRITERIA``.
        context: calibration text and progress.
        comparable: whether costs will be compared across groups. Gradients of one loss are comparable as they are; other
            scores are divided by the group's mean, which compares positions with their own layer's.
    """
    groups = [prunable.group for prunable in prunables]
    calibration = context.calibration or CalibrationStream(())
    scores = CRITERIA[criterion].score(analysis, groups, calibration, context.progress)
    choices = []
    for prunable in prunables:
        score = scores[prunable.group.leaf]
        if comparable and criterion not in ("taylor", "fisher", "ablation"):
            score = score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)
        order = score.argsort(descending=True, stable=True).flip(0)  # of equals, the later goes first
        choices.append(Choice(prunable, Removal(order, score[order])))
    return choices


def rank_by_obs(
    analysis: Analysis,
    prunables: Sequence[Prunable],
    context: PassContext,
    *,
    global_ranking: bool,
    nested: Mapping[Axis, Group],
) -> list[Choice]:
    """Greedy OBS on the inputs of each group's consumers; see ``removal_order``.

    Errors are relative to the residual sum that they enter, token by token, because the next norm divides by that; those of
    layers that feed none, to the mean square of their own outputs where costs are compared.

    Args:
        analysis, prunables: what is ranked; all from ``with_closed_form``.
        context: calibration text and progress.
        global_ranking: rank as far as the smallest size it may choose, with costs that can be compared across groups.
        nested: leaf -> outer group, where each outer position chooses its own.
    """
    linears = {linear.node.name: linear for linear in find_linears(analysis.program)[0]}
    readers = {p.group.leaf: [linears[c.node] for c in p.group.consumers] for p in prunables}
    names = {linear.input.name for found in readers.values() for linear in found}
    relative_to, alone = _residual_sums(analysis.program, [r for found in readers.values() for r in found])
    energies = _energies(analysis.program, alone, context) if global_ranking and alone else {}
    counts = {
        p.group.leaf: _removals(p, nested.get(p.group.leaf), as_far_as_possible=global_ranking) for p in prunables
    }
    waiting, grams, choices = list(prunables), dict[str, Gram](), list[Choice]()
    with context.progress.task("choose what to remove", total=sum(counts.values())) as task:
        for name, gram in each_gram(analysis.program, names, _text(context), context.progress, relative_to=relative_to):
            grams[name] = gram
            ready = [p for p in waiting if all(r.input.name in grams for r in readers[p.group.leaf])]
            for prunable in ready:
                leaf = prunable.group.leaf
                consumers, size, quota = _consumers(
                    analysis, prunable.group, readers[leaf], grams, energies, nested.get(leaf)
                )
                removal = removal_order(consumers, size, counts[leaf], quota=quota, advance=task.advance)
                choices.append(_choice(prunable, removal, nested.get(leaf)))
            waiting = [p for p in waiting if p not in ready]
            needed = {reader.input.name for p in waiting for reader in readers[p.group.leaf]}
            grams = {name: gram for name, gram in grams.items() if name in needed}
    return choices


def _removals(prunable: Prunable, outer: Group | None, *, as_far_as_possible: bool) -> int:
    """Units that are ranked: those that go, or all that could."""
    least, size = prunable.kept, prunable.group.size
    if as_far_as_possible:
        least = max(prunable.step, size // LEAST_SHARE // prunable.step * prunable.step)
    return (size - least) * (outer.size if outer is not None else 1)


def _consumers(
    analysis: Analysis,
    group: Group,
    readers: Sequence[Linear],
    grams: Mapping[str, Gram],
    energies: Mapping[str, float],
    outer: Group | None,
) -> tuple[list[Consumer], int, torch.Tensor | None]:
    """What ``removal_order`` takes: the consumers, the number of units and the quota."""
    inputs: dict[str, Consumer] = {}
    quota, size = None, group.size
    for reader in readers:
        columns = dict(coords(axis_of(analysis, reader.weight.name, reader.axis)))
        units = columns[group.leaf]
        if outer is not None:
            rows = columns[outer.leaf]
            size = outer.size * group.size
            units = torch.where(units >= 0, rows * group.size + units, units)
            quota = torch.arange(size) // group.size
        gram, weight = grams[reader.input.name], analysis.program.weights.load(reader.tensor).float()
        energy = (weight.t() @ weight if reader.axis == 1 else weight @ weight.t()).double()
        if reader.node.name in energies:
            outputs = weight.shape[1 - reader.axis]
            energy *= gram.count * outputs / max(energies[reader.node.name], 1e-300)
        if reader.input.name in inputs:
            energy += inputs[reader.input.name].energy
        inputs[reader.input.name] = Consumer(energy, gram.second, units)
    return list(inputs.values()), size, quota


def _choice(prunable: Prunable, removal: Removal, outer: Group | None) -> Choice:
    if outer is not None:  # one cost per round, which takes one position from every outer one
        removal = Removal(removal.order, removal.cost.view(-1, outer.size).sum(1))
    return Choice(prunable, removal, outer)


def _residual_sums(program: Program, readers: Sequence[Linear]) -> tuple[dict[str, str], list[Linear]]:
    """Input of each reader -> the residual sum its output enters, and the readers whose outputs enter none."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found: dict[str, str] = {}
    for reader in readers:
        objective = objective_of(reader, order)
        if objective.others and fake_tensor(objective.value).shape[-1] == fake_tensor(reader.node).shape[-1]:
            found[reader.input.name] = objective.value.name
    return found, [reader for reader in readers if reader.input.name not in found]


def _energies(program: Program, readers: Sequence[Linear], context: PassContext) -> dict[str, float]:
    """Linear node -> sum of squares of its output over the text."""
    places = [(reader.node.name, -1) for reader in readers]
    norms = feature_norms(program, places, _text(context), context.progress)
    return {name: float(norm.square().sum()) for (name, _), norm in norms.items()}


def _text(context: PassContext) -> CalibrationStream:
    """The text that greedy OBS needs: the pass has refused to run it without."""
    assert context.calibration is not None
    return context.calibration


def kept_sizes(choices: Sequence[Choice], *, fraction: float, global_ranking: bool) -> dict[Axis, int]:
    """Positions each group keeps: what was asked for alike, or the cheapest removal of the same number of parameters overall.

    The global form takes blocks of one step, always the one with the lowest cost per parameter next; groups may stay whole.
    """
    if not global_ranking:
        return {c.prunable.group.leaf: c.prunable.kept for c in choices}
    budget = fraction * sum(c.prunable.parameters * c.prunable.group.size for c in choices)
    kept = {c.prunable.group.leaf: c.prunable.group.size for c in choices}
    queue: list[tuple[float, int, int]] = []
    for place, choice in enumerate(choices):
        _offer(queue, place, choice, choice.prunable.group.size)
    while budget > 0 and queue:
        _, place, size = heapq.heappop(queue)
        prunable = choices[place].prunable
        removed = (kept[prunable.group.leaf] - size) * prunable.parameters
        if removed > 2 * budget:  # leaving it out is nearer to what was asked for
            continue
        budget -= removed
        kept[prunable.group.leaf] = size
        _offer(queue, place, choices[place], size)
    return kept


def _offer(queue: list[tuple[float, int, int]], place: int, choice: Choice, size: int) -> None:
    """Put the group's next smaller size into the queue, by its cost per parameter."""
    prunable, cost = choice.prunable, choice.removal.cost
    full = prunable.group.size
    smaller = (size - 1) // prunable.step * prunable.step
    least = max(prunable.step, full // LEAST_SHARE // prunable.step * prunable.step)
    if smaller < least or full - smaller > len(cost):
        return
    added = float(cost[full - size : full - smaller].sum())
    heapq.heappush(queue, (added / ((size - smaller) * prunable.parameters), place, smaller))


def keep_table(choice: Choice, size: int) -> Keep:
    """The table the rewriting engine takes, for ``size`` kept positions."""
    group = choice.prunable.group
    if choice.outer is None:
        kept = torch.ones(group.size, dtype=torch.bool)
        kept[choice.removal.order[: group.size - size]] = False
        return kept
    cells = torch.ones(choice.outer.size * group.size, dtype=torch.bool)
    cells[choice.removal.order[: (group.size - size) * choice.outer.size]] = False
    return choice.outer.anchor, cells.view(choice.outer.size, group.size)


def outer_of(analysis: Analysis, group: Group, among: Sequence[Group]) -> Group | None:
    """The group of ``among`` inside which ``group`` lies wherever it is contracted, or None."""
    found: set[Axis] = set()
    for contact in group.consumers:
        axis = analysis.labels[contact.operand][contact.dim]
        if not isinstance(axis, Axis) or not isinstance(find(axis).size, int):
            return None
        found |= {leaf for leaf, _ in coords(axis)}
    return next((other for other in among if other.leaf in found and other.leaf is not group.leaf), None)
