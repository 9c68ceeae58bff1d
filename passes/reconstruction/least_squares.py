"""Refit linear layers, front to back, so that the pruned network computes what the dense one did.

For a linear ``y = W x + b`` of the pruned program, with ``x`` as the pruned network now produces it and ``t`` the dense
program's value at the same place (the residual sum it feeds, else its own output):

    W' = W + argmin_D  sum_tokens w | t - other - W x - b - D x |^2 + damp |D|^2

where a token of a residual sum counts by ``w``, one over its mean square there: the next norm divides by that.
A layer that lost inputs thus passes their work to the inputs it kept, and every layer on the residual stream also repairs
what earlier ones lost. Closed form, no training; each node runs once per batch for either program.

Sources: least-squares reconstruction after structured pruning as in FASP (arXiv:2501.09412) and ZipLM (arXiv:2302.04089);
sequential targets from the dense network as in arXiv:2208.11580 (OBC) and arXiv:2502.07784.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.reconstruction.regression import DAMPINGS, Correction, Regression
from compile_sparse.passes.reconstruction.walk import Gather, LayerVisit, Walk, own_bias

__all__ = ["Refitted", "refit"]


@dataclass(frozen=True)
class Refitted:
    """What the repair did.

    Attributes:
        program: the pruned program with new weights.
        layers: number of linear layers that changed.
        residual: share of what their outputs lacked (sum of squares over all of them, weighted as in the fit) that is left.
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

    Left alone: what ``Walk`` leaves alone (tied embeddings, lm_head, linears whose place the dense program does not have), and
    layers that share their bias with other nodes.

    Raises:
        ModelError: CS2503 when the activations are not finite.
        EnvironmentFailure: CS5011 when the temporary folder is full.
    """
    layers = [
        layer
        for layer in find_linears(pruned)[0]
        if (only is None or layer.node.name in only)
        and (own_bias(pruned, layer) or (layer.bias is None and not biases_only))
    ]
    walk = Walk(dense, pruned, calibration, layers=layers, gather=gather, stands_for=stands_for)
    missing = left = 0.0
    changed = 0
    with progress.task("refit layers", total=len(walk.layers)) as task:
        for visit in walk:
            found = _correction(visit, None if biases_only else dampings)
            if found.weight is not None or found.bias is not None:
                changed, missing, left = changed + 1, missing + found.missing, left + found.left
                visit.replace(
                    weight=None if found.weight is None else visit.weight.double() + found.weight,
                    bias=None if found.bias is None or visit.bias is None else visit.bias.double() + found.bias,
                )
            task.advance()
    return Refitted(walk.program, changed, left / missing if missing else 0.0)


def _correction(visit: LayerVisit, dampings: Sequence[float] | None) -> Correction:
    """Of the weight (and bias) with one of ``dampings``, or without them of the bias alone."""
    weight, bias = visit.weight, visit.bias
    regression = Regression(weight.shape[1], weight.shape[0], intercept=bias is not None)
    for x, target, counts in zip(visit.inputs(), visit.targets(), visit.weights(), strict=True):
        missing = target - x @ weight.t()
        regression.add(x, missing if bias is None else missing - bias, counts)
    return regression.mean_shift() if dampings is None else regression.solve(dampings)
