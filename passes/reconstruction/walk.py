"""Walk a changed network front to back beside the dense one, and give its linear layers new values on the way.

    walk = Walk(dense, student, calibration)
    for visit in walk:
        for x, target in zip(visit.inputs(), visit.targets(), strict=True):
            ...
        visit.replace(weight=...)
    walk.program    # the student with the new values

A closed-form solver (least squares, GPTQ, SparseGPT) is a body of this loop: layers come in graph order, each once, and see
what the layers before them now compute. The student runs once in all; the dense network runs once if its values are asked
for, else not at all.

Shapes: ``T`` rows of one batch (tokens, for a transformer), ``K`` in_features and ``N`` out_features of the layer in the
student. Memory: one stage's weights of either program (see ``LayerwiseExecutor``), the live values of all batches, and the
dense values of layers ahead of the walk (those of one block). New weights wait on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.execution.scratch import Scratch
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.passes.reconstruction.dense_values import DenseValues
from compile_sparse.passes.reconstruction.matching import Objective, objective_of
from compile_sparse.passes.statistics.row_weights import row_weights

__all__ = ["Gather", "LayerVisit", "Walk", "own_bias"]

Gather = Callable[[str, torch.Tensor], torch.Tensor]
"""``gather(dense node, dense value)``: the part of the value that is left in the student."""


@dataclass(frozen=True)
class LayerVisit:
    """One linear layer ``y = x W^T + b`` of the student; valid until the walk goes on.

    Attributes:
        layer: where it is in the student's graph.
        objective: the value the layer answers for: the residual sum it feeds, else its own output.
        weight: ``W: [N, K]``, whichever way it is stored.
        bias: ``b: [N]``; None when it has none of its own.
    """

    layer: Linear
    objective: Objective
    weight: torch.Tensor
    bias: torch.Tensor | None
    _walk: Walk = field(repr=False)

    def inputs(self) -> Iterator[torch.Tensor]:
        """``x: [T, K]`` of each batch, as the student now computes it."""
        return self._student(self.layer.input, self.weight.shape[1])

    def targets(self) -> Iterator[torch.Tensor]:
        """``[T, N]`` of each batch: what the layer should give for the student's value to equal the dense one.

        Where the value is a residual sum, that is the dense sum less the other terms as the student now computes them: the layer
        also repairs what earlier ones lost.
        """
        width = self.weight.shape[0]
        others = [self._student(other, width) for other in self.objective.others]
        for target, *terms in zip(self._dense(self.objective.value, width), *others, strict=True):
            for term in terms:
                target = target - term
            yield target

    def weights(self) -> Iterator[torch.Tensor | None]:
        """How much the rows of each batch count, ``[T, 1]``: ``row_weights`` of the dense residual sum; None, alike, where the
        layer answers for its own output.
        """
        width = self.weight.shape[0]
        for value in self._dense(self.objective.value, width):
            yield row_weights(value) if self.objective.others else None

    def dense_inputs(self) -> Iterator[torch.Tensor]:
        """``[T, K]`` of each batch: the dense network's value at the place of ``inputs``. Needs ``Walk(dense_inputs=True)``.

        Raises:
            KeyError: the dense network has no such value (the input of a second factor), or it was not kept.
        """
        return self._dense(self.layer.input, self.weight.shape[1])

    def replace(self, *, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> None:
        """Give the layer other values, ``[N, K]`` and ``[N]``; they are cast to the dtypes the old ones have.

        Raises:
            ValueError: another shape than before, or a bias where the layer has none of its own.
            EnvironmentFailure: CS5011 when the temporary folder is full.
        """
        for new, old in ((weight, self.weight), (bias, self.bias)):
            if new is not None and (old is None or new.shape != old.shape):
                had = "none" if old is None else list(old.shape)
                raise ValueError(f"{self.layer.node.name}: {list(new.shape)} was given, there was {had}")
        if weight is not None:
            new = weight.to(self.weight.dtype)
            self._walk._keep(self.layer.tensor, new if self.layer.axis == 1 else new.t())
        name = own_bias(self._walk.student, self.layer)
        if bias is not None and self.bias is not None and name is not None:
            self._walk._keep(name, bias.to(self.bias.dtype))

    def _student(self, node: fx.Node, width: int) -> Iterator[torch.Tensor]:
        # Rows, whatever the leading dimensions: a sum may be [batch, tokens, width] where the layer saw [rows, width].
        run = self._walk._run
        return (run.value(batch, node).reshape(-1, width) for batch in range(run.batches))

    def _dense(self, node: fx.Node, width: int) -> Iterator[torch.Tensor]:
        walk, name = self._walk, self._walk._dense_name(node)
        return (walk._gather(name, value).reshape(-1, width) for value in walk._dense.of(name))


class Walk:
    """The linear layers of ``student`` that have a place in ``dense``. Iterate once.

    Args:
        dense: the program before it was changed.
        student: after; nodes of the same name mean the same value.
        calibration: text both run on.
        layers: linears of ``student`` in graph order; all when omitted.
        gather: how a dense value is cut to the student's shape.
        stands_for: node of ``student`` -> dense node whose value it should take, where that is not its namesake (layers between
            them were removed).
        sequential: whether new values count for what later layers receive. If not, every layer sees the student as it was
            given: with ``student=dense``, the dense network's inputs (parallel calibration).
        dense_inputs: keep what the dense network's layers receive, for ``LayerVisit.dense_inputs``.

    Attributes:
        student: as given.
        layers: those that will be visited. Left alone: weights that several nodes read (tied embeddings), layers whose output
            or residual sum is the logits, layers whose place the dense program does not have.
    """

    def __init__(
        self,
        dense: Program,
        student: Program,
        calibration: CalibrationStream,
        *,
        layers: Sequence[Linear] | None = None,
        gather: Gather = lambda node, value: value,
        stands_for: Mapping[str, str] | None = None,
        sequential: bool = True,
        dense_inputs: bool = False,
    ) -> None:
        self.student = student
        self._gather, self._stands_for = gather, stands_for or {}
        self._sequential, self._keeps_inputs = sequential, dense_inputs
        order = {node: place for place, node in enumerate(student.graph.nodes)}
        linears = find_linears(student)[0] if layers is None else layers
        self._objectives = {layer.node: objective_of(layer, order) for layer in linears}
        places = {node.name for node in dense.graph.nodes}
        self._logits = {n for n, o in zip(student.output_nodes, student.outputs, strict=True) if o.role == "logits"}
        self._tied = set(student.aliases.values())
        self.layers = tuple(layer for layer in linears if self._may_change(layer) and self._names(layer)[0] in places)
        awaited = [name for layer in self.layers for name in self._names(layer)]
        self._dense = DenseValues(dense, calibration, awaited)
        self._run = LayerwiseExecutor(student, calibration.feeds(student))
        self._scratch = Scratch()
        self._changed: dict[str, TensorSource] = {}

    def __iter__(self) -> Iterator[LayerVisit]:
        for layer in self.layers:
            self._run.advance(layer.node)
            yield self._visit(layer)
            for name in self._names(layer):
                self._dense.release(name)

    @property
    def program(self) -> Program:
        """The student with the values its layers were given so far."""
        return replace(self.student, weights=self.student.weights.updated(self._changed))

    def _visit(self, layer: Linear) -> LayerVisit:
        load, bias = self.student.weights.load, own_bias(self.student, layer)
        weight = load(layer.tensor)
        rows = weight if layer.axis == 1 else weight.t()
        return LayerVisit(layer, self._objectives[layer.node], rows, load(bias) if bias else None, self)

    def _may_change(self, layer: Linear) -> bool:
        tied = layer.tensor in self._tied or len(layer.weight.users) > 1
        return not tied and self._logits.isdisjoint((layer.node, self._objectives[layer.node].value))

    def _dense_name(self, node: fx.Node) -> str:
        return self._stands_for.get(node.name, node.name)

    def _names(self, layer: Linear) -> list[str]:
        """Dense values a visit may ask for."""
        nodes = [self._objectives[layer.node].value] + ([layer.input] if self._keeps_inputs else [])
        return [self._dense_name(node) for node in nodes]

    def _keep(self, tensor: str, value: torch.Tensor) -> None:
        self._changed[tensor] = self._scratch.keep(value)
        if self._sequential:
            self._run.replace(tensor, self._changed[tensor])


def own_bias(program: Program, layer: Linear) -> str | None:
    """Stored name of the layer's bias ``[N]``; None when it has none, or one that other nodes read too."""
    tensor = program.tensor_of(layer.bias) if layer.bias is not None and len(layer.bias.users) == 1 else None
    return tensor if tensor is not None and len(program.weights[tensor].shape) == 1 else None
