"""How large activations become on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from compile_sparse.compiler.contract import PassContext
from compile_sparse.compiler.execute import Executor
from compile_sparse.compiler.program import Program

__all__ = ["largest_magnitudes"]


def largest_magnitudes(program: Program, nodes: Iterable[fx.Node], context: PassContext) -> dict[str, float]:
    """Node name -> ``max|x|`` over all calibration windows (min-max calibration, arXiv:2004.09602 section 4.1).

    One run of the text; memory is that of a run.
    """
    found = {node.name: 0.0 for node in nodes}

    def observer(name: str) -> Callable[[torch.Tensor], None]:
        def observe(value: torch.Tensor) -> None:
            found[name] = max(found[name], float(value.abs().max()))

        return observe

    if context.calibration is None:
        raise RuntimeError("the caller checks that there is calibration text")
    executor, observers = Executor(program), {name: observer(name) for name in found}
    with context.progress.task("measure activation ranges", total=len(context.calibration)) as task:
        for inputs in context.calibration.feeds(program):
            executor.run(inputs, observe=observers)
            task.advance()
    return found
