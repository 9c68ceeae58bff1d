"""Refit linear layers, front to back, so that the pruned network computes what the dense one did.

For a linear ``y = W x + b`` of the pruned program, with ``x`` as the pruned network now produces it and ``t`` the dense
program's value at the same place (the residual sum it feeds, else its own output):

    W' = W + argmin_D  sum_tokens | t - other - W x - b - D x |^2 + damp |D|^2

A layer that lost inputs thus passes their work to the inputs it kept, and every layer on the residual stream also repairs
what earlier ones lost. Closed form, no training; each node runs once per batch for either program.

Sources: least-squares reconstruction after structured pruning as in FASP (arXiv:2501.09412) and ZipLM (arXiv:2302.04089);
sequential targets from the dense network as in arXiv:2208.11580 (OBC) and arXiv:2502.07784.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.execution.scratch import Scratch
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.reconstruction.matching import Objective, objective_of
from compile_sparse.passes.reconstruction.regression import DAMPINGS, Correction, Regression

__all__ = ["Refitted", "refit"]

_BIAS = {"linear": 2, "addmm": 0}
"""Operator -> position of its bias."""

Gather = Callable[[str, torch.Tensor], torch.Tensor]
"""``gather(dense node, dense value)``: the part of the value that is left in the pruned program."""


@dataclass(frozen=True)
class Refitted:
    """What the repair did.

    Attributes:
        program: the pruned program with new weights.
        layers: number of linear layers that changed.
        residual: share of what their outputs lacked (sum of squares over all of them) that is left.
    """

    program: Program
    layers: int
    residual: float

    @property
    def achieved(self) -> dict[str, float]:
        """For a pass's report."""
        return {"refitted_layers": self.layers, "missing_energy_left": round(self.residual, 4)}


def refit(
    dense: Program,
    pruned: Program,
    calibration: CalibrationStream,
    progress: Progress,
    *,
    gather: Gather = lambda node, value: value,
    only: Collection[str] | None = None,
    stands_for: Mapping[str, str] | None = None,
    biases_only: bool = False,
    dampings: Sequence[float] = DAMPINGS,
) -> Refitted:
    """Refit the pruned program's linear layers to the dense program.

    Args:
        dense: the program before pruning.
        pruned: after; nodes of the same name mean the same value.
        calibration: text both run on.
        progress: one step per layer.
        gather: how a dense value is cut to the pruned program's shape.
        only: names of linear nodes to refit; None: all that can be.
        stands_for: node of the pruned program -> dense node whose value it should take, where that is not its namesake
            (layers between them were removed).
        biases_only: keep the weights and shift the outputs of layers that have a bias by what they lack on average.
        dampings: see ``Regression``.

    Left alone: weights read by several nodes (tied embeddings), layers that make the logits, linears whose place the dense
    program does not have.
    """
    work = _Refit(dense, pruned, calibration, gather, stands_for or {}, None if biases_only else dampings)
    layers = [
        layer for layer in find_linears(pruned)[0] if (only is None or layer.node.name in only) and work.fits(layer)
    ]
    work.expect(layers)
    missing = left = 0.0
    changed = 0
    with progress.task("refit layers", total=len(layers)) as task:
        for layer in layers:
            found = work.refit(layer)
            if found.weight is not None or found.bias is not None:
                changed, missing, left = changed + 1, missing + found.missing, left + found.left
            task.advance()
    program = replace(pruned, weights=pruned.weights.updated(work.changed))
    return Refitted(program, changed, left / missing if missing else 0.0)


class _Refit:
    def __init__(
        self,
        dense: Program,
        pruned: Program,
        calibration: CalibrationStream,
        gather: Gather,
        stands_for: Mapping[str, str],
        dampings: Sequence[float] | None,
    ) -> None:
        self.pruned, self.gather, self.stands_for, self.dampings = pruned, gather, stands_for, dampings
        self.dense_nodes = {node.name: node for node in dense.graph.nodes}
        self.order = {node: place for place, node in enumerate(pruned.graph.nodes)}
        self.logits = {n for n, o in zip(pruned.output_nodes, pruned.outputs, strict=True) if o.role == "logits"}
        self.tied = set(pruned.aliases.values())
        self.teacher = LayerwiseExecutor(dense, calibration.feeds(dense))
        self.student = LayerwiseExecutor(pruned, calibration.feeds(pruned))
        self.scratch = Scratch()
        self.changed: dict[str, TensorSource] = {}
        self.awaited: Counter[str] = Counter()
        self.values: dict[str, dict[int, torch.Tensor]] = {}

    def fits(self, layer: Linear) -> bool:
        objective = objective_of(layer, self.order)
        return (
            len(layer.weight.users) == 1
            and layer.tensor not in self.tied
            and objective.value not in self.logits
            and layer.node not in self.logits
            and self._target_name(objective) in self.dense_nodes
            and (bool(self._bias_name(layer)) or (self.dampings is not None and not self._has_bias(layer)))
        )

    def expect(self, layers: Sequence[Linear]) -> None:
        """Dense values that will be asked for: parallel branches ask for one behind the place of the next."""
        self.awaited = Counter(self._target_name(objective_of(layer, self.order)) for layer in layers)

    def _target_name(self, objective: Objective) -> str:
        name = objective.value.name
        return self.stands_for.get(name, name)

    def _target(self, name: str) -> dict[int, torch.Tensor]:
        """The dense value of every batch; kept from when the walk passed it until the last layer that asks."""
        node = self.dense_nodes[name]
        if not self.teacher.passed(node):

            def watcher(watched: str) -> Callable[[int, torch.Tensor], None]:
                return self.values.setdefault(watched, {}).__setitem__

            self.teacher.advance(node, inclusive=True, watch={watched: watcher(watched) for watched in self.awaited})
        self.awaited[name] -= 1
        if self.awaited[name]:
            return self.values[name]
        del self.awaited[name]
        return self.values.pop(name)

    def refit(self, layer: Linear) -> Correction:
        """Fit one layer."""
        objective = objective_of(layer, self.order)
        name = self._target_name(objective)
        values = self._target(name)
        self.student.advance(layer.node)
        weight, bias = self._values(layer)
        regression = Regression(weight.shape[1], weight.shape[0], intercept=bias is not None)
        for batch in range(self.student.batches):
            # Rows, whatever the leading dimensions: a sum may be [batch, tokens, width] where the layer saw [rows, width].
            x = self.student.value(batch, layer.input).reshape(-1, weight.shape[1])
            missing = self.gather(name, values[batch]).reshape(-1, weight.shape[0])
            for other in objective.others:
                missing = missing - self.student.value(batch, other).reshape(-1, weight.shape[0])
            missing = missing - x @ weight.t()
            regression.add(x, missing if bias is None else missing - bias)
        found = regression.mean_shift() if self.dampings is None else regression.solve(self.dampings)
        if found.weight is not None:
            new = (weight.double() + found.weight).to(weight.dtype)
            self._store(layer.tensor, new if layer.axis == 1 else new.t().contiguous())
        if found.bias is not None and bias is not None:
            self._store(self._bias_name(layer), (bias.double() + found.bias).to(bias.dtype))
        return found

    def _store(self, tensor: str, value: torch.Tensor) -> None:
        self.changed[tensor] = self.scratch.keep(value)
        self.student.replace(tensor, self.changed[tensor])

    def _values(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``W: [N, K]`` and ``b: [N]`` as stored in the pruned program."""
        weight = self.pruned.weights.load(layer.tensor)
        name = self._bias_name(layer)
        return weight if layer.axis == 1 else weight.t(), self.pruned.weights.load(name) if name else None

    def _has_bias(self, layer: Linear) -> bool:
        place = _BIAS.get(op_name(layer.node))
        return place is not None and place < len(layer.node.args) and layer.node.args[place] is not None

    def _bias_name(self, layer: Linear) -> str:
        """Stored name of the bias; empty when there is none of its own."""
        place = _BIAS.get(op_name(layer.node))
        node = layer.node.args[place] if place is not None and place < len(layer.node.args) else None
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return ""
        tensor = self.pruned.tensor_of(node)
        return tensor if tensor is not None and len(self.pruned.weights[tensor].shape) == 1 else ""
